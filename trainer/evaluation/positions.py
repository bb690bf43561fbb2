"""Suite `positions`: loss by the number of tokens before, in documents that are long enough.

Every document counts in every bucket, so that a slope is one of position and not of documents.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from pydantic.dataclasses import dataclass

from conf.schema import STRICT, PositiveInt
from trainer.data import load_tokenizer
from trainer.evaluation import Evaluation, Value
from trainer.evaluation.scoring import Piece, Progress, Scorer
from trainer.evaluation.texts import Format, token_documents
from trainer.figure import HALF, LIGHT, render
from trainer.restore import Restored


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PositionsSuite:
    path: str | list[str] | None
    """Files, folders or globs; null: the validation documents of the run."""
    format: Format | None
    """null: by file ending."""
    text_key: str
    """Field that holds the text of a jsonl or parquet record."""
    length: PositiveInt | None
    """Tokens of each document that are measured; shorter documents are left out; null: data.seq_len
    of the run."""
    max_documents: PositiveInt
    """Documents measured, the first ones that are long enough."""
    batch_tokens: PositiveInt
    """Tokens computed at a time; a longer document is computed alone."""

    def evaluate(self, restored: Restored) -> Evaluation:
        """Return a row per bucket of positions, each twice as far as the one before."""
        data = restored.config.data
        length = self.length or data.seq_len
        progress = Progress("suite=positions")
        scorer = Scorer(restored.model, restored.config.ops)
        short: list[int] = []
        pieces = self._pieces(restored, length, short)
        losses: list[np.ndarray] = []
        for _, score in scorer.score(pieces, max(self.batch_tokens, length)):
            losses.append(score.losses)
            progress.report(len(losses), "documents", f"loss {losses[-1].mean():.4g}")
        if not losses:
            longest = max(short, default=0)
            raise ValueError(
                f"suites.positions.length={length} needs a document of {length + 1} tokens and the "
                f"longest of {len(short)} has {longest}; use suites.positions.length="
                f"{max(1, longest - 1)} or longer documents in suites.positions.path"
            )
        rows = _rows(np.stack(losses))
        note = f"The first {length:,} predicted tokens of {len(losses):,} documents"
        note += f"; {len(short):,} shorter ones were left out" if short else ""
        note += ". position: tokens before the predicted one; standard_error: over documents."
        return Evaluation("positions", rows, [note], {"positions": _figure(rows)})

    def _pieces(self, restored: Restored, length: int, short: list[int]) -> Iterator[Piece]:
        """Yield the starts of the documents that are long enough; note the others' lengths."""
        data = restored.config.data
        tokenizer = load_tokenizer(data.tokenizer)
        documents = token_documents(
            data, tokenizer, "positions", self.path, self.format, self.text_key
        )
        count = 0
        for tokens in documents:
            if len(tokens) <= length:
                short.append(len(tokens))
                continue
            yield Piece(tokens[: length + 1], length)
            count += 1
            if count == self.max_documents:
                return


def _rows(losses: np.ndarray) -> list[dict[str, Value]]:
    """Return the rows from losses [documents, length]."""
    num_documents, length = losses.shape
    rows: list[dict[str, Value]] = []
    for octave in range((length - 1).bit_length() + 1):
        first, last = 2**octave // 2 + 1, min(2**octave, length)
        means = losses[:, first - 1 : last].mean(1, dtype=np.float64)
        loss = float(means.mean())
        spread = float(means.std(ddof=1)) if num_documents > 1 else None
        rows.append(
            {
                "position": f"{first:,}-{last:,}" if last > first else f"{first:,}",
                "first": first,
                "last": last,
                "nats_per_token": loss,
                "standard_error": None if spread is None else spread / math.sqrt(num_documents),
                "perplexity": math.exp(min(loss, 700.0)),
                "tokens": num_documents * (last - first + 1),
            }
        )
    return rows


def _figure(rows: Sequence[Mapping[str, Any]]) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        middles = [math.sqrt(row["first"] * row["last"]) for row in rows]
        losses = [row["nats_per_token"] for row in rows]
        errors = [row["standard_error"] or 0.0 for row in rows]
        axes.errorbar(middles, losses, errors, marker="o", markersize=3, color=LIGHT["blue"])
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("tokens before")
        axes.set_ylabel("loss (nats per token)")

    return render("positions", (HALF, 3.1), draw)
