"""Suite `text`: perplexity and bits per byte over any text, every token but a document's first."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass as plain_dataclass
from itertools import groupby

import numpy as np
from pydantic.dataclasses import dataclass

from conf.schema import STRICT, DataConfig, PositiveInt
from trainer.data import Tokenizer, load_tokenizer
from trainer.evaluation import Evaluation, Value
from trainer.evaluation.scoring import Piece, Progress, Scorer, windows
from trainer.evaluation.texts import Document, Format, read_documents
from trainer.restore import Restored


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextSuite:
    path: str | list[str] | None
    """Files, folders or globs, local or fsspec URLs."""
    text: str | None
    """The text itself, in place of `path`."""
    format: Format | None
    """null: by file ending."""
    text_key: str
    """Field that holds the text of a jsonl or parquet record."""
    seq_len: PositiveInt | None
    """Tokens that a window reads; null: data.seq_len of the run."""
    stride: PositiveInt | None
    """Tokens from one window to the next; null: seq_len, windows that do not overlap."""
    max_tokens: PositiveInt | None
    """Predicted tokens per file, after which the rest of it is left out; null: all."""
    batch_tokens: PositiveInt
    """Tokens computed at a time; a longer window is computed alone."""

    def __post_init__(self) -> None:
        if self.stride and self.seq_len and self.stride > self.seq_len:
            raise ValueError(
                f"suites.text.stride={self.stride} leaves out tokens between windows of seq_len="
                f"{self.seq_len}; use stride={self.seq_len} or less"
            )

    def evaluate(self, restored: Restored) -> Evaluation:
        """Return a row per file and, for several files, one for all of them."""
        if (self.path is None) == (self.text is None):
            raise ValueError(
                f"suites.text.path={self.path!r} and suites.text.text={self.text!r}: give one of "
                "them, files to read or the text itself"
            )
        data = restored.config.data
        seq_len = self.seq_len or data.seq_len
        stride = min(self.stride or seq_len, seq_len)
        tokenizer = load_tokenizer(data.tokenizer)
        scorer = Scorer(restored.model, restored.config.ops)
        progress = Progress("suite=text")
        files: dict[str, _Sums] = {}
        for source, documents in groupby(self._documents(data), lambda document: document.source):
            sums = files[source] = _Sums()
            pieces = self._pieces(documents, tokenizer, sums, seq_len, stride)
            for piece, score in scorer.score(pieces, max(self.batch_tokens, seq_len)):
                sums.add(piece.num_predicted, float(score.losses.sum(dtype=np.float64)))
                progress.report(sums.num_tokens, "tokens", f"perplexity {sums.perplexity:.4g}")
        return Evaluation("text", _rows(files), [_note(seq_len, stride)])

    def _documents(self, data: DataConfig) -> Iterator[Document]:
        if self.text is not None:
            yield Document("text", self.text)
        if self.path is not None:
            yield from read_documents(data, "text", self.path, self.format, self.text_key)

    def _pieces(
        self,
        documents: Iterable[Document],
        tokenizer: Tokenizer,
        sums: "_Sums",
        seq_len: int,
        stride: int,
    ) -> Iterator[Piece]:
        """Cut the documents of a file into windows, and count what they hold."""
        left = math.inf if self.max_tokens is None else self.max_tokens
        for document in documents:
            tokens = tokenizer.encode(document.text)
            num_predicted = int(min(len(tokens) - 1, left))
            if num_predicted < 1:
                continue
            text = document.text
            if num_predicted < len(tokens) - 1:
                tokens = tokens[: num_predicted + 1]
                text = tokenizer.decode(tokens).rstrip("\ufffd")
            # The first token predicts nothing; one of a character in several has a byte at least.
            first = tokenizer.decode(tokens[:1]).rstrip("\ufffd")
            sums.num_documents += 1
            sums.num_bytes += len(text.encode(errors="replace")) - max(1, len(first.encode()))
            left -= num_predicted
            yield from windows(tokens, seq_len, stride)


@plain_dataclass
class _Sums:
    """What was predicted of a file, and at which loss (nats)."""

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    loss: float = 0.0

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss / self.num_tokens, 700.0))

    def add(self, num_tokens: int, loss: float) -> None:
        self.num_tokens += num_tokens
        self.loss += loss

    def row(self, name: str) -> dict[str, Value]:
        return {
            "text": name,
            "perplexity": self.perplexity,
            "nats_per_token": self.loss / self.num_tokens,
            "bits_per_byte": self.loss / math.log(2) / self.num_bytes,
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
            "documents": self.num_documents,
        }


def _rows(files: dict[str, _Sums]) -> list[dict[str, Value]]:
    filled = {name: sums for name, sums in files.items() if sums.num_tokens}
    if not filled:
        raise ValueError(
            "suites.text has no text of two tokens, and the first one is never predicted; give "
            "more text"
        )
    total = _Sums()
    for sums in filled.values():
        total.num_documents += sums.num_documents
        total.num_bytes += sums.num_bytes
        total.add(sums.num_tokens, sums.loss)
    rows = [sums.row(name) for name, sums in filled.items()]
    return rows if len(rows) == 1 else [*rows, total.row("all")]


def _note(seq_len: int, stride: int) -> str:
    context = "all tokens before it"
    if stride < seq_len:
        context += f", from the second window on {seq_len - stride + 1:,} at least"
    return (
        f"Windows of {seq_len:,} tokens, one every {stride:,}; every token but the first of a "
        f"document is predicted once, from {context} in its window. Bytes are those of the "
        "predicted tokens, in UTF-8."
    )
