"""Shards to packed batches; the position in the data is one number, the samples consumed.

A sample is a window of seq_len tokens of a split's documents laid end to end. Which samples a step
takes depends on the seed and the samples consumed before it, never on ranks or micro batches.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from trainer.data.shards import check_length, load_ends, load_meta, tokens_file

IGNORE_INDEX = -100


class Window(NamedTuple):
    """One sequence."""

    tokens: np.ndarray
    """int64 [seq_len]."""
    labels: np.ndarray
    """int64 [seq_len]: the next token, or -100 at the last token of a document."""
    boundaries: np.ndarray
    """int64: where documents begin inside the window, 0 left out."""


class Batch(NamedTuple):
    """A micro batch: its sequences packed one after another, T = micro_batch_size * seq_len."""

    tokens: torch.Tensor
    """int64 [1, T]."""
    labels: torch.Tensor
    """int64 [1, T]: already shifted, -100 where nothing is predicted."""
    cu_seqlens: torch.Tensor
    """int32 [N + 1]: boundaries of documents and of sequences, from 0 to T."""
    num_bytes: float
    """Bytes of text that the valid labels stand for, by the mean of the split."""


class TokenDataset:
    """Windows of one split, in the order of the shards (`sequence`) or shuffled (`sample`)."""

    def __init__(self, folder: Path, split: str, seq_len: int, seed: int) -> None:
        """Map the shards; ValueError if the split is too short for a sequence."""
        meta = load_meta(folder)
        check_length(meta, split, seq_len)
        counts = meta.splits[split]
        self.seq_len = seq_len
        self.vocab_size = meta.vocab_size
        self.num_sequences = (counts.num_tokens - 1) // seq_len
        # A document of n tokens has n - 1 labels, which stand for all its text.
        self.bytes_per_label = counts.num_bytes / (counts.num_tokens - counts.num_documents)
        self._seed = seed
        self._tokens = np.memmap(tokens_file(folder, split), meta.dtype, mode="r")
        self._ends = load_ends(folder, split)

    def sequence(self, index: int) -> Window:
        """Return window `index` of 0 .. num_sequences - 1."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences} (0 is the first)")
        start = index * self.seq_len
        stop = start + self.seq_len
        tokens = self._tokens[start : stop + 1].astype(np.int64)
        first, last = np.searchsorted(self._ends, (start, stop), side="right")
        ends = np.array(self._ends[first:last]) - start
        labels = tokens[1:].copy()
        labels[ends - 1] = IGNORE_INDEX
        return Window(tokens[:-1], labels, ends[ends < self.seq_len])

    def sample(self, number: int) -> Window:
        """Return sample `number` of the run, 0 and up; every epoch has an order of its own."""
        epoch, position = divmod(number, self.num_sequences)
        return self.sequence(int(_permutation(self.num_sequences, self._seed, epoch)[position]))


def micro_batches(
    dataset: TokenDataset,
    consumed: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> list[Batch]:
    """Return what data rank `dp_rank` computes in the step that begins at sample `consumed`.

    All ranks together compute samples consumed .. consumed + global_batch_size - 1, whatever
    dp_size and micro_batch_size.

    Raises:
        ValueError: global_batch_size does not divide by micro_batch_size * dp_size.
    """
    unit = micro_batch_size * dp_size
    if global_batch_size % unit:
        lower = global_batch_size // unit * unit
        near = f"{lower} or {lower + unit}" if lower else f"{unit}"
        raise ValueError(
            f"data.global_batch_size={global_batch_size} does not divide by data.micro_batch_size="
            f"{micro_batch_size} times dp={dp_size}; use data.global_batch_size={near}"
        )
    per_rank = global_batch_size // dp_size
    begin = consumed + dp_rank * per_rank
    windows = [dataset.sample(number) for number in range(begin, begin + per_rank)]
    return _pack_all(windows, micro_batch_size, dataset.bytes_per_label)


def validation_batches(
    dataset: TokenDataset, max_sequences: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[Batch]:
    """Return the part of data rank `dp_rank` of `max_sequences` windows, evenly spread.

    Every rank gets equally many batches of equal shape; where the windows run out, padding fills
    them: its labels are -100, so that it adds nothing to any sum.
    """
    count = min(max_sequences, dataset.num_sequences)
    per_rank = -(-count // (micro_batch_size * dp_size)) * micro_batch_size
    padding = Window(
        tokens=np.zeros(dataset.seq_len, np.int64),
        labels=np.full(dataset.seq_len, IGNORE_INDEX, np.int64),
        boundaries=np.zeros(0, np.int64),
    )
    numbers = range(dp_rank, per_rank * dp_size, dp_size)
    windows = [
        dataset.sequence(n * dataset.num_sequences // count) if n < count else padding
        for n in numbers
    ]
    return _pack_all(windows, micro_batch_size, dataset.bytes_per_label)


def _pack_all(windows: list[Window], size: int, bytes_per_label: float) -> list[Batch]:
    starts = range(0, len(windows), size)
    return [_pack(windows[start : start + size], bytes_per_label) for start in starts]


def _pack(windows: list[Window], bytes_per_label: float) -> Batch:
    cu_seqlens = [np.zeros(1, np.int64)]
    start = 0
    for window in windows:
        stop = start + len(window.tokens)
        cu_seqlens += [window.boundaries + start, np.array([stop])]
        start = stop
    labels = np.concatenate([window.labels for window in windows])
    return Batch(
        tokens=torch.from_numpy(np.concatenate([window.tokens for window in windows]))[None],
        labels=torch.from_numpy(labels)[None],
        cu_seqlens=torch.from_numpy(np.concatenate(cu_seqlens).astype(np.int32)),
        num_bytes=float((labels != IGNORE_INDEX).sum() * bytes_per_label),
    )


@lru_cache(maxsize=4)
def _permutation(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState's streams are frozen, so that a run goes on in the same order after an upgrade.
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(bits).permutation(num_sequences)
