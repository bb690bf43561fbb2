"""Suite recall of the benchmarks: what is asked, and that a model trains on it."""

import pytest
import torch
from helpers.models import build_model, compose_config, compose_tree

from cluster.accelerators.cpu import ACCELERATOR
from conf.schema import BenchConfig, build
from trainer.bench import recall
from trainer.bench.recall import SEQ_LEN, bench_recall, recall_batch, train_recall


def test_every_key_is_asked_for_once_and_has_the_value_it_came_with() -> None:
    batch = recall_batch(50, torch.Generator().manual_seed(0))
    tokens, labels = (x.view(50, SEQ_LEN) for x in batch)
    places = set()
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        pairs = dict(zip(row[:8:2], row[1:8:2], strict=True))
        assert len(pairs) == 4
        assert all(0 < key < 32 <= value < 64 for key, value in pairs.items())
        asked = [i for i, value in enumerate(label) if value != -100]
        assert sorted(row[i] for i in asked) == sorted(pairs)
        assert all(label[i] == pairs[row[i]] == row[i + 1] for i in asked)
        rest = [row[i] for i in range(8, 64) if i not in asked and i - 1 not in asked]
        assert set(rest) == {0}
        places |= set(asked)
    assert places == set(range(8, 64, 2))


def test_training_learns_and_is_checked_on_new_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "BATCH_SIZE", 4)
    config = compose_config("model=recall").model
    checks = list(train_recall(build_model(config), 3, 2))
    assert [step for step, _ in checks] == [2, 3]
    assert all(0 <= accuracy <= 1 for _, accuracy in checks)


def test_rows_name_the_mixers_and_a_small_vocabulary_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        recall, "train_recall", lambda *_: iter([(250, 0.5), (500, 0.995), (750, 1.0)])
    )
    tree = compose_tree("suite=recall", "model=recall", "dtype=float32", config_name="bench")
    rows = list(bench_recall(build(BenchConfig, tree), ACCELERATOR, 1.0))
    assert {row.case for row in rows} == {"recall, window, linear"}
    assert [row.value for row in rows[:2]] == [0.995, 500]
    tree["model"]["vocab_size"] = 40
    with pytest.raises(ValueError, match=r"use model\.vocab_size=64, or model=recall"):
        next(bench_recall(build(BenchConfig, tree), ACCELERATOR, 1.0))
