"""Shards to packed batches; the position in the data is one number, the samples consumed.

A sample is a window of seq_len tokens of a split's documents, laid end to end or by
`trainer.data.packing`. Which samples a step takes depends on the seed and the samples consumed
before it, never on ranks or micro batches.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from conf.schema import DataConfig
from trainer.data.packing import open_windows
from trainer.data.shards import check_length, load_ends, load_mask, load_meta, tokens_file

IGNORE_INDEX = -100


class Window(NamedTuple):
    """One sequence."""

    tokens: np.ndarray
    """int64 [seq_len]."""
    labels: np.ndarray
    """int64 [seq_len]: the next token, or -100 where none is to be predicted."""
    boundaries: np.ndarray
    """int64: where documents, and padding, begin inside the window, 0 left out."""
    bytes_per_label: float
    """Bytes of text that a label which counts stands for, by the mean of the split."""
    num_padding: int = 0
    """Tokens at the end that are none of a document."""


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
    padding: tuple[int, ...] = ()
    """Which of the documents are padding."""

    def doc_lengths(self) -> list[int]:
        """Return the tokens of each document that is none of the padding."""
        lengths: list[int] = self.cu_seqlens.diff().tolist()
        padding = set(self.padding)
        return [length for i, length in enumerate(lengths) if i not in padding]


class Dataset(Protocol):
    """Windows of one split of a source, or of several sources."""

    seq_len: int
    vocab_size: int
    num_sequences: int
    """Windows for validation."""

    def sample(self, number: int) -> Window:
        """Return sample `number` of a run, 0 and up."""

    def spread(self, number: int, count: int) -> Window:
        """Return window `number` of `count` evenly spread ones, at most `num_sequences`."""

    def seen(self, consumed: int) -> list[str]:
        """Say of each source what of it a run has seen with so many samples."""


class TokenDataset:
    """Windows of one split, in the order of the shards (`sequence`) or shuffled (`sample`)."""

    def __init__(
        self,
        folder: Path,
        split: str,
        seq_len: int,
        seed: int,
        config: DataConfig | None = None,
        name: str = "data",
    ) -> None:
        """Map the shards; ValueError if the split has no window.

        Args:
            folder: of the shards.
            split: train or val.
            seq_len: tokens of a window.
            seed: of the order of the samples.
            config: says how windows keep to documents; None: documents are laid end to end.
            name: of the source.
        """
        meta = load_meta(folder)
        counts = meta.splits[split]
        self.seq_len, self.name = seq_len, name
        self.vocab_size = meta.vocab_size
        # A document of n tokens has n - 1 labels, which stand for all its text.
        self.bytes_per_label = counts.num_bytes / max(1, counts.num_labels)
        self._seed = seed
        self._tokens = np.memmap(tokens_file(folder, split), meta.dtype, mode="r")
        self._ends = load_ends(folder, split)
        self._is_learned = load_mask(folder, split)
        if config is None or config.packing == "stream":
            assert self._is_learned is None, "windows of conversations keep to them"
            check_length(meta, split, seq_len)
            self._pieces = None
            self.num_sequences = (counts.num_tokens - 1) // seq_len
            self._tokens_per_window = float(seq_len)
        else:
            self._pieces = open_windows(folder, split, config, self._ends, self._is_learned)
            self.num_sequences = len(self._pieces.first) - 1
            self._tokens_per_window = self._pieces.length.sum() / max(1, self.num_sequences)
        if not self.num_sequences:
            raise ValueError(
                f"data.seq_len={seq_len} cuts every answer of the {split} split off; use a longer "
                "data.seq_len, or data.too_long=cut"
            )

    def sequence(self, index: int) -> Window:
        """Return window `index` of 0 .. num_sequences - 1."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences} (0 is the first)")
        if self._pieces is not None:
            return self._gather(self._pieces.of(index))
        start = index * self.seq_len
        stop = start + self.seq_len
        tokens = self._tokens[start : stop + 1].astype(np.int64)
        first, last = np.searchsorted(self._ends, (start, stop), side="right")
        ends = np.array(self._ends[first:last]) - start
        labels = tokens[1:].copy()
        labels[ends - 1] = IGNORE_INDEX
        return Window(tokens[:-1], labels, ends[ends < self.seq_len], self.bytes_per_label)

    def _gather(self, pieces: list[tuple[int, int]]) -> Window:
        """Return the window of these pieces, padded at its end."""
        tokens = np.zeros(self.seq_len, np.int64)
        labels = np.full(self.seq_len, IGNORE_INDEX, np.int64)
        boundaries, stop = [], 0
        for start, length in pieces:
            here = slice(stop, stop + length)
            tokens[here] = self._tokens[start : start + length]
            labels[here] = self._tokens[start + 1 : start + length + 1]
            if self._is_learned is not None:
                is_ignored = ~self._is_learned[start + 1 : start + length + 1]
                labels[here][is_ignored] = IGNORE_INDEX
            stop += length
            boundaries.append(stop)
        inner = np.array([at for at in boundaries if at < self.seq_len], np.int64)
        return Window(tokens, labels, inner, self.bytes_per_label, self.seq_len - stop)

    def sample(self, number: int) -> Window:
        """Return sample `number` of the run, 0 and up; every epoch has an order of its own."""
        epoch, position = divmod(number, self.num_sequences)
        return self.sequence(int(_permutation(self.num_sequences, self._seed, epoch)[position]))

    def spread(self, number: int, count: int) -> Window:
        """Return window `number` of `count` evenly spread ones."""
        return self.sequence(number * self.num_sequences // count)

    def seen(self, consumed: int) -> list[str]:
        """Say what a run has seen with so many samples."""
        tokens, epochs = consumed * self._tokens_per_window, consumed / self.num_sequences
        return [f"{self.name} {tokens:,.0f} tokens, {epochs:.3g} epochs"]


def micro_batches(
    dataset: Dataset,
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
    return _pack_all(windows, micro_batch_size)


def validation_batches(
    dataset: Dataset, max_sequences: int, micro_batch_size: int, dp_rank: int, dp_size: int
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
        bytes_per_label=0.0,
        num_padding=dataset.seq_len,
    )
    numbers = range(dp_rank, per_rank * dp_size, dp_size)
    windows = [dataset.spread(n, count) if n < count else padding for n in numbers]
    return _pack_all(windows, micro_batch_size)


def _pack_all(windows: list[Window], size: int) -> list[Batch]:
    return [_pack(windows[start : start + size]) for start in range(0, len(windows), size)]


def _pack(windows: list[Window]) -> Batch:
    cu_seqlens, padding = [0], []
    start, num_bytes = 0, 0.0
    for window in windows:
        stop = start + len(window.tokens)
        cu_seqlens += [*(window.boundaries + start).tolist(), stop]
        if window.num_padding:
            padding.append(len(cu_seqlens) - 2)
        num_bytes += float((window.labels != IGNORE_INDEX).sum() * window.bytes_per_label)
        start = stop
    return Batch(
        tokens=torch.from_numpy(np.concatenate([window.tokens for window in windows]))[None],
        labels=torch.from_numpy(np.concatenate([window.labels for window in windows]))[None],
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        num_bytes=num_bytes,
        padding=tuple(padding),
    )


@lru_cache(maxsize=16)
def _permutation(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState's streams are frozen, so that a run goes on in the same order after an upgrade.
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(bits).permutation(num_sequences)
