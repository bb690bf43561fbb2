"""Where text comes from: Python's standard library, or files of txt, jsonl and parquet.

Files are local or behind any fsspec URL; `trainer.data.shards` reads them once.
"""

import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import fsspec
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from conf.schema import DataConfig
from trainer.data.chat import MessagesField

_ENDING = re.compile(r"\.(txt|jsonl|parquet)(\.gz|\.bz2|\.xz)?$")
_ENDINGS = ".txt, .jsonl or .parquet"
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Whichever of these a file system reports tells one version of a file from the next.
_VERSION_KEYS = ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag", "created")
_BATCH_CHARS = 4_000_000


@dataclass(frozen=True)
class SourceFile:
    """A file of documents."""

    fs: Any
    """fsspec file system that opens it."""
    path: str
    format: str
    """txt, jsonl or parquet; python: as txt, but skipped where it is not UTF-8."""
    size: int | None
    """Bytes; None where the file system does not tell."""
    stamp: str
    """Identifies the content in the key of the cache."""


class Field(Protocol):
    """What of a record is its document."""

    def columns(self, names: list[str], place: str) -> list[str]:
        """Return the fields to read of a record that has these; ValueError if they lack."""

    def document(self, record: dict[str, Any], place: str) -> str:
        """Return the document of a record; ValueError, with the place, if it is none."""


@dataclass(frozen=True)
class TextField:
    """A field of text."""

    key: str

    def columns(self, names: list[str], place: str) -> list[str]:
        if self.key in names:
            return [self.key]
        raise ValueError(
            f"data.text_key={self.key!r} is no field of {place}; set data.text_key to the one that "
            f"holds the text: {', '.join(names) or 'there is none'}"
        )

    def document(self, record: dict[str, Any], place: str) -> str:
        value = record[self.key]
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"data.text_key={self.key!r} holds {type(value).__name__} instead of text in "
                f"{place}; set data.text_key to a field of strings"
            )
        return value or ""


def field_of(config: DataConfig) -> Field:
    """Return what of a record is its document."""
    if config.source == "chat":
        return MessagesField(config.messages_key)
    return TextField(config.text_key)


def describe_source(config: DataConfig, num_files: int) -> str:
    """Say in a few words where the text comes from."""
    if config.source == "stdlib":
        return f"standard library of Python {platform.python_version()}, {num_files} files"
    return f"{', '.join(_paths(config))}, {num_files} files"


def list_files(config: DataConfig) -> list[SourceFile]:
    """Return the files of a config without the empty ones; ValueError if none is left."""
    if config.source == "stdlib":
        return _list_stdlib(config)
    files: dict[str, SourceFile] = {}
    for path in _paths(config):
        files |= {file.path: file for file in _match(path, config.format)}
    if config.source == "chat":
        _refuse_texts(files.values())
    filled = [file for file in files.values() if file.size != 0]
    if not filled:
        raise ValueError(
            f"data.path={config.path!r} matches empty files only, such as {min(files)!r}; "
            "training needs text, name other files"
        )
    return filled


def read_texts(file: SourceFile, text_key: str) -> Iterator[str]:
    """Yield the texts of a file; see `read_documents`."""
    return read_documents(file, TextField(text_key))


def read_documents(file: SourceFile, field: Field) -> Iterator[str]:
    """Yield the documents of a file in order; ValueError, with the place, on what is none."""
    if file.format == "parquet":
        yield from _read_parquet(file, field)
    elif file.format == "jsonl":
        yield from _read_jsonl(file, field)
    else:
        yield from _read_whole(file)


def text_batches(files: list[SourceFile], field: Field) -> Iterator[tuple[list[str], int]]:
    """Yield the documents that are not empty in batches of a few MB.

    With each batch comes the number of input bytes read up to its end, an estimate within a file.
    """
    texts: list[str] = []
    num_chars = num_done = 0
    for file in files:
        size = file.size or 0
        num_read = 0
        for text in filter(None, read_documents(file, field)):
            texts.append(text)
            num_chars += len(text)
            num_read += len(text)
            if num_chars >= _BATCH_CHARS:
                yield texts, num_done + min(num_read, size)
                texts, num_chars = [], 0
        num_done += size
    if texts:
        yield texts, num_done


def _list_stdlib(config: DataConfig) -> list[SourceFile]:
    for key, value in (("path", config.path), ("format", config.format)):
        if value is not None:
            raise ValueError(
                f"data.{key}={value!r} has no meaning for data.source=stdlib, which reads Python's "
                f"own library; use data=text, or data.{key}=null"
            )
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    fs = fsspec.filesystem("file")
    library = []
    for file in sorted(files):
        size = file.stat().st_size
        stamp = f"{platform.python_version()} {file.relative_to(root).as_posix()} {size}"
        library.append(SourceFile(fs, str(file), "python", size, stamp))
    library = [file for file in library if file.size]
    if not library:
        raise ValueError(
            f"data.source=stdlib finds no files in {str(root)!r}; use data=text data.path=..."
        )
    return library


def _paths(config: DataConfig) -> list[str]:
    paths = [config.path] if isinstance(config.path, str) else config.path or []
    if not paths or not all(paths):
        raise ValueError(
            f"data.path={config.path!r} names no files and data.source={config.source} needs some; "
            f"set data.path to files, folders or globs of {_ENDINGS}"
        )
    return paths


def _match(path: str, given_format: str | None) -> list[SourceFile]:
    """Return the files that one entry of `data.path` stands for, sorted; at least one."""
    try:
        fs, root = fsspec.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"data.path={path!r} cannot be opened: {error}; use a local path, or the URL of a file "
            "system for which fsspec has its package installed"
        ) from error
    if fs.isdir(root):
        wanted = {given_format} if given_format else {"txt", "jsonl", "parquet"}
        infos = {
            name: info
            for name, info in fs.find(root, detail=True).items()
            if _format_of(name) in wanted
        }
        if not infos:
            raise ValueError(
                f"data.path={path!r} is a folder without files that end in "
                f"{' or '.join(sorted('.' + name for name in wanted))}; name the files by a glob "
                f"such as '{path.rstrip('/')}/*' and set data.format"
            )
    elif fs.isfile(root):
        infos = {root: fs.info(root)}
    else:
        infos = {
            n: info for n, info in fs.glob(root, detail=True).items() if info["type"] == "file"
        }
        if not infos:
            raise ValueError(
                f"data.path={path!r} matches no file; check the path (relative ones start at the "
                "working directory), or name files, folders or globs"
            )
    return [_source_file(fs, name, infos[name], given_format) for name in sorted(infos)]


def _source_file(fs: Any, name: str, info: dict[str, Any], given_format: str | None) -> SourceFile:
    file_format = given_format or _format_of(name)
    if file_format is None:
        raise ValueError(
            f"data.format=null cannot tell the format of {name!r}, which does not end in "
            f"{_ENDINGS}; set data.format=txt, jsonl or parquet"
        )
    version = next((info[key] for key in _VERSION_KEYS if info.get(key)), None)
    stamp = f"{file_format} {name} {info.get('size')} {version}"
    return SourceFile(fs, name, file_format, info.get("size"), stamp)


def _format_of(name: str) -> str | None:
    ending = _ENDING.search(name)
    return ending[1] if ending else None


def _read_whole(file: SourceFile) -> Iterator[str]:
    with file.fs.open(file.path, "rb", compression="infer") as stream:
        content = stream.read()
    if file.format == "python":
        with suppress(UnicodeDecodeError):
            yield content.decode()
        return
    try:
        yield content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.path: {file.path!r} is no UTF-8 text ({error.reason} at byte {error.start}); "
            "convert it or leave it out"
        ) from error


def _read_jsonl(file: SourceFile, field: Field) -> Iterator[str]:
    with file.fs.open(file.path, "rb", compression="infer") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"line {number} of {file.path!r}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"data.path: {place} is no JSON ({error}); repair the file or set data.format"
                ) from error
            record = record if isinstance(record, dict) else {}
            field.columns(sorted(record), place)
            # JSON can escape half of a surrogate pair, which UTF-8 cannot hold.
            yield field.document(record, place).encode(errors="replace").decode()


def _read_parquet(file: SourceFile, field: Field) -> Iterator[str]:
    with file.fs.open(file.path, "rb") as stream:
        try:
            table = pq.ParquetFile(stream)
        except ValueError as error:
            raise ValueError(
                f"data.path: {file.path!r} is no parquet file ({error}); replace it or set "
                "data.format"
            ) from error
        columns = field.columns(table.schema_arrow.names, repr(file.path))
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                yield field.document(record, repr(file.path))


def _refuse_texts(files: Iterable[SourceFile]) -> None:
    for file in files:
        if file.format == "txt":
            raise ValueError(
                f"data.path: {file.path!r} is text and data.source=chat needs records; name files "
                "of jsonl or parquet, or set data.format"
            )
