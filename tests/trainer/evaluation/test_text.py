"""Suite text: perplexity as with Transformers on the same windows, exact counts, packing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.evaluation import evaluate, restored_model
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.evaluation.scoring import Scorer, windows

LLAMA = (
    "model.layers=[{mixers:[full],ffn:dense}]", "model.num_layers=2", "model.tie_embeddings=false",
    "model.norm_eps=1e-5",
)  # fmt: skip
THEIRS = {
    "mixer.branches.full": "self_attn",
    "mixer_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    ".ffn.": ".mlp.",
}
TEXT = "The quick brown fox, which is no dog, jumps over — not under — the dog. Ætt, ok? " * 2


@pytest.mark.parametrize(("seq_len", "stride"), [(32, 32), (40, 13), (512, 512)])
def test_perplexity_is_that_of_transformers(seq_len: int, stride: int, tmp_path: Path) -> None:
    restored = restored_model(*LLAMA)
    (tmp_path / "a.txt").write_text(TEXT)
    result = evaluate(
        restored, "text", path=tmp_path / "a.txt", seq_len=seq_len, stride=stride, batch_tokens=80
    )
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=264,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    ).eval()
    weights = {}
    for name, tensor in restored.model.state_dict().items():
        for ours, theirs in THEIRS.items():
            name = name.replace(ours, theirs)
        name = name.replace("embed.", "embed_tokens.")
        weights[name.replace("head.", "lm_head.") if "head" in name else f"model.{name}"] = tensor
    llama.load_state_dict(weights)
    tokens = torch.tensor(list(TEXT.encode()))[None]
    losses = torch.full((tokens.shape[1],), torch.nan)
    with torch.no_grad():
        for start in range(0, tokens.shape[1] - 1, stride):
            window = tokens[:, start : start + seq_len + 1]
            scores = llama(window).logits[0, :-1].log_softmax(-1)
            new = losses[start + 1 : start + window.shape[1]]
            found = -scores.gather(1, window[0, 1:, None])[:, 0]
            new.copy_(torch.where(new.isnan(), found, new))
    assert not losses[1:].isnan().any()
    row = result.rows[0]
    assert row["perplexity"] == pytest.approx(math.exp(losses[1:].mean()), rel=1e-5)
    assert row["tokens"] == row["bytes"] == len(TEXT.encode()) - 1
    assert row["bits_per_byte"] == pytest.approx(float(losses[1:].mean()) / math.log(2), rel=1e-5)


def test_packed_documents_do_not_see_each_other_and_add_up(tmp_path: Path) -> None:
    restored = restored_model("model.num_sinks=3")
    texts = ["abc", "x", "window and ring", "spikes " * 9]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"t": t}) + "\n" for t in texts[1:]))
    (tmp_path / "a.txt").write_text(texts[0])
    result = evaluate(restored, "text", path=tmp_path, text_key="t", seq_len=20)
    a, b, total = result.rows
    assert [a["tokens"], b["tokens"], b["documents"]] == [2, 14 + 62, 2]  # "x" predicts nothing
    assert total["tokens"] == 78
    alone = [evaluate(restored, "text", text=f"'{t}'", seq_len=20).rows[0] for t in texts[2:]]
    expected = sum(row["nats_per_token"] * row["tokens"] for row in alone) / 76
    assert b["nats_per_token"] == pytest.approx(expected, rel=1e-5)
    assert total["text"] == "all"
    assert total["nats_per_token"] == pytest.approx(
        (2 * a["nats_per_token"] + 76 * b["nats_per_token"]) / 78
    )
    cut = evaluate(restored, "text", path=tmp_path, text_key="t", seq_len=20, max_tokens=20)
    assert [row["tokens"] for row in cut.rows] == [2, 20, 22]
    assert cut.rows[1]["bytes"] == 20


def test_every_token_but_the_first_is_predicted_once_with_enough_context() -> None:
    tokens = np.arange(100)
    for seq_len, stride in [(10, 10), (10, 3), (33, 1), (99, 99), (200, 7)]:
        predicted: list[int] = []
        for number, piece in enumerate(windows(tokens, seq_len, stride)):
            assert len(piece.tokens) - 1 <= seq_len
            context = len(piece.tokens) - piece.num_predicted
            assert context >= seq_len - stride + 1 or number == 0
            predicted += piece.tokens[-piece.num_predicted :].tolist()
        assert predicted == list(range(1, 100))


@pytest.mark.parametrize("overrides", [(), ("spike.enabled=true",), ("model.num_sinks=3",)])
def test_answers_score_as_in_one_pass(overrides: tuple[str, ...]) -> None:
    restored = restored_model(*overrides)
    scorer = Scorer(restored.model, restored.config.ops)
    tokens = np.random.randint(257, size=30)
    answers = [tokens[24:], tokens[24:25], tokens[20:23]]
    scores = scorer.score_answers(tokens[:24], answers)
    for answer, (log_likelihood, is_greedy) in zip(answers, scores, strict=True):
        piece = windows(np.concatenate([tokens[:24], answer]), 60, 60)
        ((_, whole),) = scorer.score(piece, 64)
        assert log_likelihood == pytest.approx(-whole.losses[23:].sum(), rel=1e-4)
        assert is_greedy == whole.is_likeliest[23:].all()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "give one of them"),
        ({"text": "a"}, "no text of two tokens"),
        ({"path": "nowhere.txt"}, "suites.text.path='nowhere.txt' matches no file"),
        ({"text": "ab", "seq_len": 4, "stride": 5}, "use stride=4 or less"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        evaluate(restored_model(), "text", **settings)
