"""Token shards: every document tokenised once, then only read, by memory map.

A folder holds, for the splits train and val, `<split>.tokens.bin` (the documents one after
another, each with its end-of-document token; uint16 or uint32), `<split>.ends.npy` (int64, one
past the last token of each document) and, of conversations, `<split>.mask.bin` (uint8, 1 for a
token that is learned), and meta.json. Its name is a hash of all that shaped it.
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
from trainer.data.chat import ChatEncoder
from trainer.data.packing import check_windows
from trainer.data.sources import (
    SourceFile,
    describe_source,
    field_of,
    list_files,
    read_documents,
    text_batches,
)
from trainer.data.tokenizer import Encoded, TextEncoder, find_tokenizer_file, load_tokenizer

SPLITS = ("train", "val")
_VERSION = 1
_LOG_SECONDS = 10.0

logger = logging.getLogger(__name__)

Encoder = TextEncoder | ChatEncoder


@dataclass(frozen=True)
class SplitMeta:
    """Counts of one split."""

    num_tokens: int
    """End-of-document tokens included."""
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the text, of conversations those of the answers."""
    num_learned: int | None = None
    """Tokens that the mask marks; None: there is no mask."""

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted, which stand for all the bytes."""
        if self.num_learned is not None:
            return self.num_learned
        return self.num_tokens - self.num_documents


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


def check_source(config: DataConfig) -> None:
    """Raise ValueError if a source cannot work; reads one record at most."""
    files = list_files(config)
    find_tokenizer_file(config.tokenizer)
    with_records = [file for file in files if file.format in ("jsonl", "parquet")]
    for file in with_records[:1]:
        document = next(read_documents(file, field_of(config)), None)
        if config.source == "chat" and document:
            _build_encoder(config).encode_batch([document])


def prepare(config: DataConfig) -> Path:
    """Tokenise one source unless that was done before, and return the folder of the shards.

    Any number of processes may call it at once: one works, the others wait.

    Raises:
        ValueError: what `check_source` finds, a record that is no text, no text at all, or a split
            with too few tokens for a window.
    """
    files = list_files(config)
    encoder = _build_encoder(config)
    cache = Path(config.cache_dir).expanduser()
    folder = cache / f"{config.source}-{_key(config, files, encoder)}"
    if _defect(folder):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            _build_if_needed(folder, files, config, encoder)
    meta = load_meta(folder)
    for split in SPLITS:
        if config.packing == "stream":
            check_length(meta, split, config.seq_len)
        else:
            check_windows(load_ends(folder, split), split, config)
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


def load_mask(folder: Path, split: str) -> np.ndarray | None:
    """Map which tokens of a split are learned, bool [num_tokens]; None: there is no mask."""
    file = _mask_file(folder, split)
    return np.memmap(file, bool, mode="r") if file.exists() else None


def load_ends(folder: Path, split: str) -> np.ndarray:
    """Map the ends of a split's documents, int64 [num_documents]."""
    return np.load(folder / f"{split}.ends.npy", mmap_mode="r", allow_pickle=False)


def _mask_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.mask.bin"


def _build_encoder(config: DataConfig) -> Encoder:
    tokenizer = load_tokenizer(config.tokenizer)
    if config.source == "chat":
        return ChatEncoder(tokenizer, config.tokenizer, config.chat_template)
    return TextEncoder(tokenizer)


def _key(config: DataConfig, files: list[SourceFile], encoder: Encoder) -> str:
    key = config.messages_key if config.source == "chat" else config.text_key
    parts = [str(_VERSION), encoder.fingerprint, repr(config.val_fraction), key]
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
            mask = _mask_file(folder, split)
            if counts.num_learned is not None and mask.stat().st_size != counts.num_tokens:
                return f"{mask.name} has {mask.stat().st_size} bytes"
            ends = load_ends(folder, split)
            last = int(ends[-1]) if len(ends) else 0
            if (len(ends), last) != (counts.num_documents, counts.num_tokens):
                return f"{split}.ends.npy holds {len(ends)} documents up to token {last}"
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _build_if_needed(
    folder: Path, files: list[SourceFile], config: DataConfig, encoder: Encoder
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
        _build(partial, files, config, encoder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _build(folder: Path, files: list[SourceFile], config: DataConfig, encoder: Encoder) -> None:
    source = describe_source(config, len(files))
    logger.info("tokenising %s", source)
    start, num_left_out = time.monotonic(), 0
    tokenizer = encoder.tokenizer
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    train, val = writers = [
        _SplitWriter(folder, split, dtype, has_mask=config.source == "chat") for split in SPLITS
    ]
    with _progress(sum(file.size or 0 for file in files)) as report:
        for documents, num_read in text_batches(files, field_of(config)):
            for document, encoded in zip(documents, encoder.encode_batch(documents), strict=True):
                if not len(encoded.ids):
                    num_left_out += 1
                    continue
                writer = val if _is_val(document.encode(), config.val_fraction) else train
                writer.add(encoded)
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
        + (f" ({count.num_learned:,} learned)" if count.num_learned is not None else "")
        for split, count in splits.items()
    )
    left_out = f"; {num_left_out:,} without anything to learn left out" if num_left_out else ""
    logger.info("tokenised in %.1f s: %s%s", time.monotonic() - start, counts, left_out)


def _is_val(content: bytes, val_fraction: float) -> bool:
    """Choose the split by the content alone: equal documents never sit in both splits."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2**64


class _SplitWriter:
    """Appends documents to the files of one split."""

    def __init__(self, folder: Path, split: str, dtype: str, *, has_mask: bool) -> None:
        self.ends = array("q")
        self.num_tokens = 0
        self._num_bytes = self._num_learned = 0
        self._last: Encoded | None = None
        self._folder, self._split, self._dtype = folder, split, dtype
        self._file = tokens_file(folder, split).open("wb")
        self._mask = _mask_file(folder, split).open("wb") if has_mask else None

    def add(self, document: Encoded) -> None:
        self._file.write(document.ids.astype(self._dtype).tobytes())
        if self._mask is not None and document.is_learned is not None:
            self._mask.write(document.is_learned.tobytes())
        self._count(document, 1)
        self.ends.append(self.num_tokens)
        self._last = document

    def give_last_to(self, other: "_SplitWriter") -> None:
        """Move the last document: few documents can all fall into one split."""
        assert self._last is not None
        other.add(self._last)
        self._count(self._last, -1)
        self.ends.pop()
        self._file.truncate(self.num_tokens * np.dtype(self._dtype).itemsize)
        if self._mask is not None:
            self._mask.truncate(self.num_tokens)

    def close(self) -> SplitMeta:
        self._file.close()
        if self._mask is not None:
            self._mask.close()
        ends = np.array(self.ends, np.int64)
        np.save(self._folder / f"{self._split}.ends.npy", ends, allow_pickle=False)
        num_learned = None if self._mask is None else self._num_learned
        return SplitMeta(self.num_tokens, len(ends), self._num_bytes, num_learned)

    def _count(self, document: Encoded, sign: int) -> None:
        self.num_tokens += sign * len(document.ids)
        self._num_bytes += sign * document.num_bytes
        if document.is_learned is not None:
            self._num_learned += sign * int(document.is_learned.sum())


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
