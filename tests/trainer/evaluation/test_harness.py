"""Suite harness: our answers to lm-eval's requests and its figures as rows, without it."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.evaluation import evaluate, restored_model

from trainer.evaluation.scoring import Scorer, windows

TASKS = ["ours", "other"]


class LM:
    """Stands for lm_eval.api.model.LM, which sets attributes of its own."""

    def __init__(self) -> None:
        self.rank = 0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Install a harness that hands out the model and settings it was given."""
    seen: list[Any] = []

    def simple_evaluate(**settings: Any) -> dict[str, Any]:
        assert isinstance(settings["model"], LM)
        seen.append(settings)
        figures = {"alias": "ours", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 1}
        return {"results": {"ours": figures}, "n-samples": {"ours": {"effective": 8}}}

    manager = SimpleNamespace(match_tasks=lambda names: [n for n in names if n in TASKS])
    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.tasks": {"TaskManager": lambda include_path: manager},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def test_figures_become_rows(asked: list[Any]) -> None:
    result = evaluate(restored_model(), "harness", tasks="[ours]", limit=8, num_fewshot=2)
    assert asked[0]["tasks"] == ["ours"]
    assert (asked[0]["limit"], asked[0]["num_fewshot"]) == (8, 2)
    acc, f1 = result.rows
    assert (acc["metric"], acc["value"], acc["standard_error"]) == ("acc", 0.5, 0.1)
    assert (f1["filter"], f1["value"], f1["standard_error"], f1["questions"]) == (
        "strict", 1.0, None, 8,
    )  # fmt: skip


def test_likelihoods_are_those_of_the_tokens(asked: list[Any]) -> None:
    restored = restored_model("model.num_sinks=2")
    evaluate(restored, "harness", tasks="[ours]", seq_len=12, batch_tokens=16)
    model = asked[0]["model"]
    scorer = Scorer(restored.model, restored.config.ops)

    def expect(text: list[int], num: int) -> float:
        tokens = np.array(text[-13:])
        ((_, score),) = scorer.score(windows(tokens, 12, 12), 12)
        return -float(score.losses[-num:].sum())

    # The space before a continuation belongs to it, and the context is cut on the left.
    long, short = "The ring of keys goes on ", "ab"
    answers = model.loglikelihood([request(long, "here"), request("", "gate"), request(short, "c")])
    expected = [
        expect(list(b"The ring of keys goes on here"), 5),
        expect([256, *b"gate"], 4),
        expect(list(b"abc"), 1),
    ]
    assert [answer[0] for answer in answers] == pytest.approx(expected, rel=1e-4)
    assert all(isinstance(greedy, bool) for _, greedy in answers)
    tokens = np.array([256, *b"a text of two windows"])
    total = sum(float(s.losses.sum()) for _, s in scorer.score(windows(tokens, 12, 12), 12))
    rolling = model.loglikelihood_rolling([request("a text of two windows")])
    assert rolling == pytest.approx([-total], rel=1e-4)


def test_answers_end_at_a_stop_string_and_greedy_ones_are_greedy(asked: list[Any]) -> None:
    restored = restored_model()
    evaluate(restored, "harness", tasks="[ours]", seq_len=16, max_new_tokens=9)
    model = asked[0]["model"]
    with torch.no_grad():
        restored.model.embed.weight[:32].zero_()  # tied: no control characters
        restored.model.embed.weight[127:].zero_()
    whole = model.generate_until([request("x" * 30, {}), request("x" * 30, {"max_gen_toks": 4})])
    assert len(whole[0]) == 9
    assert whole[1] == whole[0][:4]
    (answer, likelihood) = whole[0], model.loglikelihood([request("x" * 16, whole[0])])
    stop = answer[3]
    cut = model.generate_until([request("x" * 30, {"until": ["", stop]})])
    assert cut == [answer[: answer.index(stop)]]
    assert isinstance(likelihood[0][1], bool)


def test_absent_package_and_unknown_tasks_are_named(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for tasks in ("[ours,nothing]", "[]"):
        with pytest.raises(ValueError, match="is no task; name tasks of lm-eval"):
            evaluate(restored_model(), "harness", tasks=tasks)
    assert not asked
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'longaxon\[eval\]'"):
        evaluate(restored_model(), "harness", tasks="[ours]")
