"""Token shards: every document tokenised once, then only read, by memory map.

A folder holds, for the splits train and val, `<split>.tokens.bin` (the documents one after
another, each with its end-of-document token; uint16 or uint32) and `<split>.ends.npy` (int64, one
past the last token of each document), and meta.json. Its name is a hash of all that shaped it.
"""

import hashlib
import json
import logging
import shutil
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from conf.schema import DataConfig
from trainer.data.sources import SourceFile, describe_source, list_files, text_batches
from trainer.data.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "val")
_VERSION = 1
_LOG_SECONDS = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitMeta:
    """Counts of one split."""

    num_tokens: int
    """End-of-document tokens included."""
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the text."""


@dataclass(frozen=True)
class ShardsMeta:
    """Content of meta.json."""

    version: int
    source: str
    tokenizer: str
    vocab_size: int
    eos_id: int
    dtype: str
    splits: dict[str, SplitMeta]


def prepare(config: DataConfig) -> Path:
    """Tokenise the data unless that was done before, and return the folder of the shards.

    Any number of processes may call it at once: one works, the others wait.

    Raises:
        ValueError: what `check_data` finds, a record that is no text, no text at all, or a split
            with fewer than `seq_len + 1` tokens.
    """
    files = list_files(config)
    tokenizer = load_tokenizer(config.tokenizer)
    cache = Path(config.cache_dir).expanduser()
    folder = cache / f"{config.source}-{_key(config, files, tokenizer)}"
    if _defect(folder):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            _build_if_needed(folder, files, config, tokenizer)
    meta = load_meta(folder)
    for split in SPLITS:
        check_length(meta, split, config.seq_len)
    return folder


def load_meta(folder: Path) -> ShardsMeta:
    """Read meta.json."""
    tree = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    splits = {split: SplitMeta(**tree["splits"][split]) for split in SPLITS}
    return ShardsMeta(**{**tree, "splits": splits})


def check_length(meta: ShardsMeta, split: str, seq_len: int) -> None:
    """Raise ValueError if a split is too short for one sequence and the label of its last token."""
    num_tokens = meta.splits[split].num_tokens
    if num_tokens > seq_len:
        return
    num_documents = sum(counts.num_documents for counts in meta.splits.values())
    if num_tokens < 2:
        remedy = f"data.path needs at least 2 documents, not {num_documents}"
    else:
        remedy = f"use data.seq_len={num_tokens - 1} at most, more text in data.path"
        remedy += ", or a larger data.val_fraction" if split == "val" else ""
    raise ValueError(
        f"data.seq_len={seq_len} needs {seq_len + 1} tokens and the {split} split has "
        f"{num_tokens}; {remedy}"
    )


def tokens_file(folder: Path, split: str) -> Path:
    """Return where the tokens of a split are."""
    return folder / f"{split}.tokens.bin"


def load_ends(folder: Path, split: str) -> np.ndarray:
    """Map the ends of a split's documents, int64 [num_documents]."""
    return np.load(folder / f"{split}.ends.npy", mmap_mode="r", allow_pickle=False)


def _key(config: DataConfig, files: list[SourceFile], tokenizer: Tokenizer) -> str:
    parts = [str(_VERSION), tokenizer.fingerprint, repr(config.val_fraction), config.text_key]
    parts += [file.stamp for file in files]
    return hashlib.sha256("\n".join(parts).encode(errors="replace")).hexdigest()[:16]


def _defect(folder: Path) -> str | None:
    """Say what keeps the shards in `folder` from being used; None if they are complete."""
    try:
        meta = load_meta(folder)
        for split, counts in meta.splits.items():
            file = tokens_file(folder, split)
            if file.stat().st_size != counts.num_tokens * np.dtype(meta.dtype).itemsize:
                return f"{file.name} has {file.stat().st_size} bytes"
            ends = load_ends(folder, split)
            last = int(ends[-1]) if len(ends) else 0
            if (len(ends), last) != (counts.num_documents, counts.num_tokens):
                return f"{split}.ends.npy holds {len(ends)} documents up to token {last}"
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _build_if_needed(
    folder: Path, files: list[SourceFile], config: DataConfig, tokenizer: Tokenizer
) -> None:
    """Make `folder` complete; its lock is held, so that nobody else does the same."""
    defect = _defect(folder)
    if defect is None:
        return
    if folder.exists():
        logger.warning("damaged token cache is built again: %s (%s)", folder, defect)
        shutil.rmtree(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _build(partial, files, config, tokenizer)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _build(folder: Path, files: list[SourceFile], config: DataConfig, tokenizer: Tokenizer) -> None:
    source = describe_source(config, len(files))
    logger.info("tokenising %s", source)
    start = time.monotonic()
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    train, val = writers = [_SplitWriter(folder, split, dtype) for split in SPLITS]
    with _progress(sum(file.size or 0 for file in files)) as report:
        for texts, num_read in text_batches(files, config.text_key):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                if not len(ids):  # A tokenizer may drop white space.
                    continue
                content = text.encode()
                writer = val if _is_val(content, config.val_fraction) else train
                writer.add(np.append(ids, tokenizer.eos_id), len(content))
            report(num_read, sum(writer.num_tokens for writer in writers))
    if not train.num_tokens and not val.num_tokens:
        raise ValueError(f"data.path={config.path!r} holds no text; name files with documents")
    for empty, other in ((train, val), (val, train)):
        if not empty.num_tokens and len(other.ends) > 1:
            other.give_last_to(empty)
    splits = {split: writer.close() for split, writer in zip(SPLITS, writers, strict=True)}
    meta = ShardsMeta(
        version=_VERSION,
        source=source,
        tokenizer=config.tokenizer,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype=dtype,
        splits=splits,
    )
    (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")
    counts = "; ".join(
        f"{split} {count.num_documents:,} documents, {count.num_tokens:,} tokens"
        for split, count in splits.items()
    )
    logger.info("tokenised in %.1f s: %s", time.monotonic() - start, counts)


def _is_val(content: bytes, val_fraction: float) -> bool:
    """Choose the split by the content alone: equal documents never sit in both splits."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2**64


class _SplitWriter:
    """Appends documents to the files of one split."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self.ends = array("q")
        self.num_tokens = 0
        self._num_bytes = self._last_num_bytes = 0
        self._folder, self._split, self._dtype = folder, split, dtype
        self._file = tokens_file(folder, split).open("w+b")

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        self._file.write(ids.astype(self._dtype).tobytes())
        self.num_tokens += len(ids)
        self.ends.append(self.num_tokens)
        self._num_bytes += num_bytes
        self._last_num_bytes = num_bytes

    def give_last_to(self, other: "_SplitWriter") -> None:
        """Move the last document: few documents can all fall into one split."""
        self.ends.pop()
        start = self.ends[-1]
        self._file.seek(start * np.dtype(self._dtype).itemsize)
        other.add(np.frombuffer(self._file.read(), self._dtype), self._last_num_bytes)
        self._file.truncate(start * np.dtype(self._dtype).itemsize)
        self.num_tokens = start
        self._num_bytes -= self._last_num_bytes

    def close(self) -> SplitMeta:
        self._file.close()
        ends = np.array(self.ends, np.int64)
        np.save(self._folder / f"{self._split}.ends.npy", ends, allow_pickle=False)
        return SplitMeta(self.num_tokens, len(ends), self._num_bytes)


class _Report:
    """Shows how far the tokenising is: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, bar: Progress, total: int) -> None:
        self._bar, self._total = bar, total
        self._task = bar.add_task("tokenising", total=total or None)
        self._last = time.monotonic()

    def __call__(self, num_read: int, num_tokens: int) -> None:
        self._bar.update(self._task, completed=num_read, description=f"{num_tokens:,} tokens")
        if self._bar.disable and time.monotonic() - self._last >= _LOG_SECONDS:
            self._last = time.monotonic()
            share = f"{num_read / self._total:.0%} read, " if self._total else ""
            logger.info("tokenising: %s%s tokens", share, f"{num_tokens:,}")


@contextmanager
def _progress(total: int) -> Iterator[_Report]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        yield _Report(bar, total)
