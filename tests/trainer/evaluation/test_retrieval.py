"""Suites positions, needle and recall: what they ask, shown by readers that know or do not know."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.evaluation import evaluate, restored_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.data import load_tokenizer
from trainer.evaluation.scoring import Scorer
from trainer.evaluation.texts import token_documents

SYLLABLES = ("ba", "ke", "li", "mo", "nu", "ra", "se", "to")
WORDS = [a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES[:2]]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides of a run on text of 128 words that are one token each, and of its text."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = " ".join(WORDS * 3)
    tokenizer.train_from_iterator([" " + text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    (folder / "text.txt").write_text(text)
    size = tokenizer.get_vocab_size()
    return f"data.tokenizer={folder}", f"model.vocab_size={size}", str(folder / "text.txt")


def test_loss_by_position_is_the_loss_of_the_text(tmp_path: Path) -> None:
    restored = restored_model("model.num_sinks=2")
    texts = ["window " * 9, "x", "spike and ring " * 5, "gate of axons " * 6]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    result = evaluate(restored, "positions", path=tmp_path, length=60)
    assert [row["position"] for row in result.rows[:3]] == ["1", "2", "3-4"]
    assert (result.rows[-1]["first"], result.rows[-1]["last"]) == (33, 60)
    assert "of 3 documents; 1 shorter ones" in result.notes[0]
    assert "<svg" in result.figures["positions"]
    expected = [
        evaluate(restored, "text", text=f"'{t[:61]}'", seq_len=60).rows[0]["nats_per_token"]
        for t in (texts[0], *texts[2:])
    ]
    total = sum(row["nats_per_token"] * row["tokens"] for row in result.rows)
    assert total / 180 == pytest.approx(np.mean(expected), rel=1e-5)
    one = evaluate(restored, "positions", path=tmp_path, length=60, max_documents=1)
    assert one.rows[0]["standard_error"] is None
    first = evaluate(restored, "text", text=f"'{texts[0][:2]}'").rows[0]["nats_per_token"]
    assert one.rows[0]["nats_per_token"] == pytest.approx(first, rel=1e-5)


def test_without_a_path_the_validation_documents_are_read(tmp_path: Path) -> None:
    texts = [f"document {number} of the run" for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    data = ("data=text", f"data.path={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}")
    restored = restored_model(*data, "data.val_fraction=0.3")
    tokenizer = load_tokenizer("bytes")
    found = token_documents(restored.config.data, tokenizer, "positions", None, None, "text")
    decoded = [tokenizer.decode(tokens) for tokens in found]
    assert 1 < len(set(decoded) & set(texts)) == len(decoded) < 40
    result = evaluate(restored, "positions", length=20)
    assert f"of {len(decoded)} documents" in result.notes[0]


def test_documents_that_are_too_short_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short text")
    with pytest.raises(
        ValueError, match=r"the longest of 1 has 10; use suites\.positions\.length=9"
    ):
        evaluate(restored_model(), "positions", path=tmp_path / "a.txt", length=50)


@pytest.mark.parametrize("kind", ["text", "letters"])
def test_needle_is_where_it_should_be_and_can_be_found(
    kind: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    *overrides, text = words if kind == "text" else ("nowhere",)
    restored = restored_model(*overrides)
    tokenizer = load_tokenizer(restored.config.data.tokenizer)
    seen: list[tuple[int, float]] = []

    def read(self: Scorer, prompt: np.ndarray, answers: list[np.ndarray]) -> list[Any]:
        said = tokenizer.decode(prompt)
        question = said[said.rindex(" The") if kind == "text" else -3 :]
        place = said.index(question)  # the needle, unless it is the question itself
        end = said.index("." if kind == "text" else ";", place)
        value = said[place + len(question) : end]
        seen.append((len(prompt), place / (len(said) - end + place - len(question))))
        given = [tokenizer.decode(answer) for answer in answers]
        assert len(set(given)) == 8
        assert len({len(answer) for answer in given}) == 1
        return [(-1.0 - (answer != value), answer == value) for answer in given]

    monkeypatch.setattr(Scorer, "score_answers", read)
    settings = {"path": text, "lengths": "[100,140]", "depths": "[0.0,0.5,1.0]", "samples": 3}
    result = evaluate(restored, "needle", **settings)
    assert [(row["length"], row["depth"]) for row in result.rows] == [
        (length, depth) for length in (100, 140) for depth in (0.0, 0.5, 1.0)
    ]
    assert all(row["exact"] == row["likeliest"] == row["mean_rank"] == 1 for row in result.rows)
    assert {length for length, _ in seen} == {100, 140}
    assert [place for _, place in seen[::3]] == pytest.approx([0, 0.5, 1] * 2, abs=0.07)
    monkeypatch.setattr(Scorer, "score_answers", lambda self, p, a: [(0.0, False) for _ in a])
    result = evaluate(restored, "needle", **settings)
    assert all(
        (row["exact"], row["likeliest"], row["mean_rank"]) == (0, 0, 8) for row in result.rows
    )


@pytest.mark.parametrize("shift", [0, 1])
def test_recall_asks_for_the_value_of_each_key(
    shift: int, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    *overrides, text = words
    restored = restored_model(*overrides)
    tokenizer = load_tokenizer(restored.config.data.tokenizer)
    queried: list[str] = []

    def recall(self: Scorer, tokens: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        logits = torch.zeros(len(rows), tokenizer.vocab_size)
        for i, row in enumerate(rows):
            queried.append(tokenizer.decode(tokens[row - 1 : row + 1]))
            first = tokens.tolist().index(tokens[row - 1])
            assert first < row - 1
            logits[i, tokens[(first + 2 + 4 * shift) % 20]] = 9.0
        return logits

    monkeypatch.setattr(Scorer, "logits", recall)
    result = evaluate(restored, "recall", pairs="[5]", fillers="[0,30]", samples=2, path=text)
    assert [row["accuracy"] for row in result.rows] == [1 - shift] * 2
    assert [row["exact"] for row in result.rows] == [1 - shift] * 2
    assert [row["tokens"] for row in result.rows] == [41, 71]
    assert [row["questions"] for row in result.rows] == [10, 10]
    assert all(len(question) == 8 and question.endswith(":") for question in queried)


@pytest.mark.parametrize("overrides", [("spike.enabled=true",), ("model.num_sinks=2",)])
def test_untrained_models_recall_and_find_by_chance(overrides: tuple[str, ...]) -> None:
    restored = restored_model(*overrides)
    row = evaluate(restored, "recall", pairs="[8]", samples=24).rows[0]
    assert row["accuracy"] == pytest.approx(1 / 8, abs=0.09)  # 4 standard deviations of 192
    assert row["nats_per_value"] == pytest.approx(math.log(264), abs=1.5)
    cell = evaluate(restored, "needle", lengths="[60]", depths="[0.5]", samples=16).rows[0]
    assert 2.5 < cell["mean_rank"] < 6.5
    assert cell["exact"] < 0.3


@pytest.mark.parametrize(
    ("suite", "settings", "problem"),
    [
        ("needle", {"lengths": "[8]"}, "needle and question alone have 9 tokens; use 10 or more"),
        ("needle", {"haystack": "text", "path": "nowhere"}, "suites.needle.path='nowhere'"),
        ("recall", {"pairs": "[27]"}, "use 26 pairs at most"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    suite: str, settings: dict[str, str], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        evaluate(restored_model(), suite, **settings)
