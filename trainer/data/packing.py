"""Windows that keep to documents: pieces of documents, and which window holds which.

A document of n tokens has n - 1 that predict the next one; those are laid into windows. A window
holds one piece of one long document, or whole documents packed by best fit, longest first
(arXiv:2404.10830), and is padded.
"""

import logging
from bisect import bisect_left, insort
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np

from conf.schema import DataConfig

_VERSION = 1

logger = logging.getLogger(__name__)


class Pieces(NamedTuple):
    """Parts of documents, by window."""

    start: np.ndarray
    """int64 [num_pieces]: first token in the shard."""
    length: np.ndarray
    """int64 [num_pieces]: tokens that predict the next one, at most a window."""
    first: np.ndarray
    """int64 [num_windows + 1]: window w holds the pieces first[w] .. first[w + 1] - 1."""

    def of(self, window: int) -> list[tuple[int, int]]:
        """Return start and length of the pieces of a window."""
        here = slice(self.first[window], self.first[window + 1])
        return list(zip(self.start[here].tolist(), self.length[here].tolist(), strict=True))


def check_windows(ends: np.ndarray, split: str, config: DataConfig) -> None:
    """Raise ValueError if no document of a split can be in a window."""
    lengths = np.diff(ends, prepend=0)
    longest, shortest = (int(f(lengths)) if len(lengths) else 0 for f in (np.max, np.min))
    more = ", or a larger data.val_fraction" if split == "val" else ""
    if config.packing == "documents":
        least = _min_doc_tokens(config.min_doc_tokens, config.seq_len)
        if longest < least:
            raise ValueError(
                f"data.packing=documents takes documents of {least} tokens or more and the longest "
                f"of the {split} split has {longest}; use data.min_doc_tokens={longest}, or "
                f"data.seq_len={longest - 1} without it, or data.packing=domain, or longer "
                f"documents in data.path{more}"
            )
    elif not longest or (config.too_long == "drop" and shortest > config.seq_len + 1):
        raise ValueError(
            f"data.packing=domain finds no document of at most {config.seq_len + 1} tokens in the "
            f"{split} split; use data.seq_len={max(1, shortest - 1)}, data.too_long=cut, or other "
            f"documents in data.path{more}"
        )


def open_windows(
    folder: Path,
    split: str,
    config: DataConfig,
    ends: np.ndarray,
    is_learned: np.ndarray | None,
) -> Pieces:
    """Return the windows of a split; they are made once, and kept beside the shards.

    Args:
        folder: of the shards.
        split: train or val.
        config: the section.
        ends: int64 [num_documents], one past the last token of each document.
        is_learned: bool [num_tokens], which tokens are to be predicted; None: all.
    """
    how = config.too_long if config.packing == "domain" else str(config.min_doc_tokens)
    name = f"{split}.windows-{_VERSION}-{config.packing}-{how}-{config.seq_len}.npz"
    file = folder / name
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return Pieces(**arrays)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        logger.warning("damaged windows are made again: %s (%s)", file, error)
    pieces = cut_windows(ends, is_learned, f"{folder.name}, {split}", config)
    # Of several processes that make the same file, each puts a whole one in place.
    working = folder / f".{name}.{uuid4().hex}"
    with working.open("wb") as stream:
        np.savez(stream, **pieces._asdict())
    working.replace(file)
    return pieces


def cut_windows(
    ends: np.ndarray, is_learned: np.ndarray | None, name: str, config: DataConfig
) -> Pieces:
    """Return the windows of the split `name` by `data.packing`, and log how full they are."""
    seq_len = config.seq_len
    starts = np.append(0, ends[:-1])
    lengths = np.diff(ends, prepend=0) - 1
    num_given = int(lengths.sum())
    least = 1
    if config.packing == "documents":
        min_doc_tokens = _min_doc_tokens(config.min_doc_tokens, seq_len)
        is_used = lengths + 1 >= min_doc_tokens
        least = min(seq_len, min_doc_tokens - 1)
    else:
        is_used = lengths <= seq_len if config.too_long == "drop" else lengths > 0
    num_long = int((lengths > seq_len).sum())
    starts, lengths = starts[is_used], lengths[is_used]
    if config.packing == "domain" and config.too_long == "truncate":
        lengths = np.minimum(lengths, seq_len)
    starts, lengths = _cut(starts, lengths, seq_len)
    is_used = lengths >= least
    if is_learned is not None:
        is_used &= _count_learned(starts, lengths, is_learned) > 0
    starts, lengths = starts[is_used], lengths[is_used]
    if config.packing == "documents":
        pieces = Pieces(starts, lengths, np.arange(len(starts) + 1))
    else:
        window = best_fit(lengths, seq_len)
        order = np.argsort(window, kind="stable")
        first = np.searchsorted(window[order], np.arange(window.max(initial=-1) + 2))
        pieces = Pieces(starts[order], lengths[order], first)
    num_windows, num_used = len(pieces.first) - 1, int(lengths.sum())
    logger.info(
        "%s: packing=%s makes %s windows, %.1f%% full; %s documents are longer than one, %.1f%% "
        "of the tokens are left out",
        name,
        config.packing,
        f"{num_windows:,}",
        100 * num_used / max(1, num_windows * seq_len),
        f"{num_long:,}",
        100 * (1 - num_used / max(1, num_given)),
    )
    return pieces


def best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Return the window of each piece: longest first, each where it leaves the least room.

    Args:
        lengths: int64 [num_pieces], each at most `seq_len`.
        seq_len: room of a window.

    Returns:
        int64 [num_pieces], windows counted from 0.
    """
    window_of = np.zeros(len(lengths), np.int64)
    windows: dict[int, list[int]] = {}  # by the room left in them
    rooms: list[int] = []  # keys of `windows`, in order
    num_windows = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, window = seq_len, num_windows
            num_windows += 1
        else:
            room = rooms[at]
            window = windows[room].pop()
            if not windows[room]:
                del windows[room], rooms[at]
        window_of[piece] = window
        left = room - length
        if left:
            if left not in windows:
                windows[left] = []
                insort(rooms, left)
            windows[left].append(window)
    return window_of


def _min_doc_tokens(given: int | None, seq_len: int) -> int:
    return seq_len + 1 if given is None else given


def _cut(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into pieces of `seq_len`; the last one of each may be shorter."""
    counts = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(starts)), counts)
    begin = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    return starts[document] + begin, np.minimum(lengths[document] - begin, seq_len)


def _count_learned(starts: np.ndarray, lengths: np.ndarray, is_learned: np.ndarray) -> np.ndarray:
    """Return how many labels of each piece count."""
    edges = np.stack([starts + 1, starts + lengths + 1], axis=1).ravel()
    # The sum from each edge to the next, the last one to the end.
    edges = edges[: np.searchsorted(edges, len(is_learned))]
    return np.asarray(np.add.reduceat(is_learned.view(np.uint8), edges, dtype=np.int64)[::2])
