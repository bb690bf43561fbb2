"""Documents to evaluate on: files of text, or the validation documents of the run."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from conf.schema import DataConfig
from trainer.data import Tokenizer, prepare_data
from trainer.data.shards import load_ends, load_meta, tokens_file
from trainer.data.sources import list_files, read_texts

Format = Literal["txt", "jsonl", "parquet"]


class Document(NamedTuple):
    """A text and where it is from."""

    source: str
    """Path of its file."""
    text: str


def read_documents(
    data: DataConfig, suite: str, path: str | list[str], file_format: Format | None, text_key: str
) -> Iterator[Document]:
    """Yield the documents of files in order; empty ones are left out.

    Args:
        data: section of the run, whose other keys hold.
        suite: name for errors.
        path, file_format, text_key: as in the section `data` of a run.

    Raises:
        ValueError: there are no such files, or no text in them.
    """
    data = dataclasses.replace(
        data, source="text", path=path, format=file_format, mix=None, validation=None
    )
    try:
        for file in list_files(dataclasses.replace(data, text_key=text_key)):
            for text in filter(None, read_texts(file, text_key)):
                yield Document(file.path, text)
    except ValueError as error:
        raise ValueError(str(error).replace("data.", f"suites.{suite}.")) from error


def token_documents(
    data: DataConfig,
    tokenizer: Tokenizer,
    suite: str,
    path: str | list[str] | None,
    file_format: Format | None,
    text_key: str,
) -> Iterator[np.ndarray]:
    """Yield the int64 tokens of each document, of `path` or, without one, of the run's validation.

    Raises:
        ValueError: as `read_documents`.
    """
    if path is not None:
        for document in read_documents(data, suite, path, file_format, text_key):
            yield tokenizer.encode(document.text)
        return
    for folder in prepare_data(data).values():
        tokens = np.memmap(tokens_file(folder, "val"), load_meta(folder).dtype, mode="r")
        start = 0
        for end in load_ends(folder, "val"):
            yield tokens[start : end - 1].astype(np.int64)  # The last one ends the document.
            start = int(end)


def collect_tokens(documents: Iterator[np.ndarray], count: int) -> np.ndarray:
    """Return the first `count` tokens of documents laid end to end, fewer if there are no more."""
    found: list[np.ndarray] = [np.zeros(0, np.int64)]
    missing = count
    while missing > 0 and (tokens := next(documents, None)) is not None:
        found.append(tokens[:missing])
        missing -= len(found[-1])
    return np.concatenate(found)
