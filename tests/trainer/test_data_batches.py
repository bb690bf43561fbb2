"""Batches: labels, packing, and an order that depends on nothing but seed and position."""

import numpy as np
import pytest
import torch

from conf.schema import DataConfig
from trainer.data import TokenDataset, micro_batches, prepare, validation_batches
from trainer.data.shards import tokens_file

EOS = 256


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "corpus").mkdir()
    for i, length in enumerate(rng.integers(1, 60, size=60)):
        text = "".join(rng.choice(list("abcdeä \n"), size=length))
        (tmp_path / "corpus" / f"{i}.txt").write_text(text, encoding="utf-8")
    config = DataConfig(
        source="text",
        path=str(tmp_path / "corpus"),
        format=None,
        text_key="text",
        tokenizer="bytes",
        cache_dir=str(tmp_path / "cache"),
        val_fraction=0.3,
        seq_len=16,
        global_batch_size=8,
        micro_batch_size=2,
    )
    return prepare(config)


def test_labels_never_cross_documents(shards):
    dataset = TokenDataset(shards, "train", 16, 0)
    tokens = np.fromfile(tokens_file(shards, "train"), "uint16").astype(int)
    assert dataset.num_sequences == (len(tokens) - 1) // 16
    for i in range(dataset.num_sequences):
        window = dataset.sequence(i)
        expected = tokens[i * 16 : i * 16 + 17]
        assert window.tokens.tolist() == expected[:-1].tolist()
        wanted = np.where(expected[:-1] == EOS, -100, expected[1:])
        assert window.labels.tolist() == wanted.tolist()
        inner = np.flatnonzero(expected[:15] == EOS) + 1
        assert window.boundaries.tolist() == inner.tolist()
    with pytest.raises(IndexError, match=f"sequence {dataset.num_sequences} of"):
        dataset.sequence(dataset.num_sequences)


def _step(dataset, consumed, micro_batch_size, dp_size, global_batch_size=8):
    return [
        batch
        for dp_rank in range(dp_size)
        for batch in micro_batches(
            dataset,
            consumed,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )
    ]


def _rows(batches, seq_len=16):
    """Sequences of batches with their labels, sorted."""
    pairs = [
        torch.cat([b.tokens.view(-1, seq_len), b.labels.view(-1, seq_len)], 1) for b in batches
    ]
    return sorted(torch.cat(pairs).tolist())


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (4, 2), (1, 8), (2, 4)])
def test_samples_of_a_step_do_not_depend_on_ranks(shards, micro_batch_size, dp_size):
    dataset = TokenDataset(shards, "train", 16, 3)
    for consumed in (0, 8, 16):
        whole = _step(dataset, consumed, 8, 1)
        parts = _step(dataset, consumed, micro_batch_size, dp_size)
        assert len(parts) == 8 // micro_batch_size
        assert _rows(parts) == _rows(whole)
        assert sum(b.num_bytes for b in parts) == pytest.approx(whole[0].num_bytes)


def test_packed_batch(shards):
    (batch,) = _step(TokenDataset(shards, "train", 16, 3), 8, 8, 1)
    assert batch.tokens.shape == batch.labels.shape == (1, 128)
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert batch.cu_seqlens.dtype == torch.int32
    after_documents = set((torch.nonzero(batch.tokens[0] == EOS) + 1).flatten().tolist())
    assert batch.cu_seqlens.tolist() == sorted(after_documents | set(range(0, 129, 16)))
    assert batch.num_bytes == (batch.labels != -100).sum()


def test_order_depends_on_the_seed_and_covers_every_epoch(shards):
    dataset = TokenDataset(shards, "train", 16, 3)
    count = dataset.num_sequences
    windows = sorted(dataset.sequence(i).tokens.tolist() for i in range(count))
    epochs = [[dataset.sample(e * count + i).tokens.tolist() for i in range(count)] for e in (0, 1)]
    assert epochs[0] != epochs[1]
    assert all(sorted(epoch) == windows for epoch in epochs)
    other = TokenDataset(shards, "train", 16, 4)
    assert [other.sample(i).tokens.tolist() for i in range(count)] != epochs[0]


@pytest.mark.parametrize("offset", [-12, -4, 0], ids=["in-epoch", "over-the-border", "at-border"])
def test_resumed_run_takes_the_same_samples(shards, offset):
    dataset = TokenDataset(shards, "train", 16, 3)
    consumed = dataset.num_sequences + offset
    resumed = _step(TokenDataset(shards, "train", 16, 3), consumed, 1, 1)
    wanted = [dataset.sample(consumed + i) for i in range(8)]
    assert [b.tokens[0].tolist() for b in resumed] == [w.tokens.tolist() for w in wanted]
    before, after = (_step(dataset, consumed - 8 + done, 2, 2) for done in (0, 8))
    assert _rows(after) == _rows(resumed) != _rows(before)


@pytest.mark.parametrize("dp_size", [1, 2, 4, 7])
@pytest.mark.parametrize("max_sequences", [1, 5, 8, 10**6])
def test_validation_ranks_get_equally_many_batches(shards, max_sequences, dp_size):
    dataset = TokenDataset(shards, "val", 16, 3)
    ranks = [
        validation_batches(dataset, max_sequences, 2, rank, dp_size) for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for batches in ranks for batch in batches]
    assert {tuple(batch.tokens.shape) for batch in batches} == {(1, 32)}
    count = min(max_sequences, dataset.num_sequences)
    spread = [i * dataset.num_sequences // count for i in range(count)]
    assert len(set(spread)) == count
    expected = [dataset.sequence(i) for i in spread]
    rows = [row for row in _rows(batches) if row[16:] != [-100] * 16]
    assert rows == sorted([*w.tokens.tolist(), *w.labels.tolist()] for w in expected)
    valid = sum(int((w.labels != -100).sum()) for w in expected)
    assert sum(batch.num_bytes for batch in batches) == valid


@pytest.mark.parametrize(("size", "near"), [(10, "8 or 12"), (3, "4")])
def test_indivisible_batch_is_refused(shards, size, near):
    message = f"data.global_batch_size={size} does not .* use data.global_batch_size={near}$"
    with pytest.raises(ValueError, match=message):
        _step(TokenDataset(shards, "train", 16, 0), 0, 2, 2, global_batch_size=size)
