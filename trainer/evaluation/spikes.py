"""Suite `spikes`: spikes, perplexity and energy over k, by coding and by input, and a better k."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from conf.schema import STRICT, PositiveFloat, PositiveInt, Ratio, SpikeConfig
from models.spiking import set_spiking
from ops.spike import spike_statistics
from ops.spike.coding import CODINGS
from trainer import plots
from trainer.data import load_tokenizer
from trainer.energy import (
    ASSUMPTIONS,
    FP16_MAC,
    INT8_MAC,
    PUBLISHED_MAC,
    energy_per_mac,
    mean_energy,
)
from trainer.evaluation import Evaluation, Value
from trainer.evaluation.scoring import Piece, Progress, Scorer, windows
from trainer.evaluation.spike_search import Found, find_setting, kind, together
from trainer.evaluation.texts import token_documents
from trainer.report import PUBLISHED_SPIKES
from trainer.restore import Restored
from trainer.spike_observer import InputCounts, SpikeObserver

OFF = SpikeConfig(enabled=False, k=3.0)
RASTER_CHANNELS = 48

DEFINITIONS = (
    "Counts of every channel of every projection input inside the layers, pooled. Sparsity at 3 "
    "time steps is 1 - E[bits set in |count|] / 3 over all counts, or over those within 7; ratio: "
    "perplexity over that without spikes; spiked_macs: share of multiply-accumulates with a spiked "
    "input."
)
PUBLISHED_NOTE = (
    f"Report: {PUBLISHED_SPIKES['source']}. It does not say which reading its sparsity is; it "
    "stands under the one over counts within 7. Its share within 7 at k = 3 is 0.951 in the "
    "trade-off over k and 0.941 elsewhere."
)
CODING_NOTE = (
    "By coding: steps for the largest count found, or for counts within 7; an addition per spike. "
    "binary and bitwise have no sign, they stand for |count|."
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SpikesSuite:
    path: str | list[str] | None
    """Text files; null: the validation documents of the run."""
    max_tokens: PositiveInt
    """Predicted tokens, after which the rest of the text is left out."""
    seq_len: PositiveInt | None
    """Tokens that a window reads; null: data.seq_len of the run."""
    ks: Annotated[list[PositiveFloat], Field(min_length=1)]
    """Every k of the table."""
    target_sparsity: Ratio | None
    """Sparsity over counts within 7 to look for a k of every input for; null: do not look."""
    max_ratio: Annotated[float, Field(gt=1)]
    """Most perplexity, over that without spikes, of what is looked for."""
    by: Literal["kind", "input"]
    """kind: inputs of the same name in all layers have the same k there; input: each has its own,
    which takes a measurement per input and, of so small differences, much text."""
    ladder: Annotated[list[PositiveFloat], Field(min_length=2)]
    """What k an input can have there, rising."""

    def __post_init__(self) -> None:
        if self.ladder != sorted(set(self.ladder)):
            raise ValueError(f"suites.spikes.ladder={self.ladder} must rise; use [1.0, 2.0, 3.0]")

    def evaluate(self, restored: Restored) -> Evaluation:
        """Return a row per k, tables by coding, by kind of input and by input, and figures."""
        spike = restored.config.spike
        reader = _Reader(restored, self._read(restored))
        settings = {"off": OFF} | {f"{k:g}": SpikeConfig(enabled=True, k=k) for k in self.ks}
        if spike.enabled and (spike.k_by_input or spike.k not in self.ks):
            settings["config"] = spike
        measured = {name: reader.measure(setting) for name, setting in settings.items()}
        wanted = ("config", f"{spike.k:g}", "3", f"{self.ks[-1]:g}")
        shown = next(name for name in wanted if name in measured and measured[name].inputs)
        tables = measured[shown].tables(shown)
        notes = [DEFINITIONS, PUBLISHED_NOTE, CODING_NOTE, ASSUMPTIONS]
        if self.target_sparsity is not None:
            found = self._search(reader)
            tables["found"], notes = found.rows, [*notes, found.note]
        reader.set(spike)
        rows = [measured[name].row(name, measured["off"].loss) for name in measured]
        figures = _draw(rows, measured[shown], shown)
        return Evaluation("spikes", [*rows, *_published(rows[0])], notes, figures, tables)

    def _read(self, restored: Restored) -> list[Piece]:
        data = restored.config.data
        tokenizer = load_tokenizer(data.tokenizer)
        documents = token_documents(data, tokenizer, "spikes", self.path, None, "text")
        seq_len = self.seq_len or data.seq_len
        pieces = _cut((p for d in documents for p in windows(d, seq_len, seq_len)), self.max_tokens)
        if not pieces:
            raise ValueError(
                "suites.spikes has no text of two tokens, and the first one is never predicted; "
                "name files in suites.spikes.path"
            )
        return pieces

    def _search(self, reader: "_Reader") -> Found:
        """Look for a setting on the first half of the text, and try it on the second."""
        first, second = reader.halves()
        assert self.target_sparsity is not None, "called to look for it"
        return find_setting(
            first.measure,
            second.measure,
            by=self.by,
            ladder=self.ladder,
            max_ratio=self.max_ratio,
            target=self.target_sparsity,
        )


@plain_dataclass(frozen=True)
class Measured:
    """What a setting does on a text.

    Attributes:
        loss: nats per token.
        seen: what its inputs were like.
    """

    loss: float
    seen: SpikeObserver

    @property
    def inputs(self) -> Mapping[str, InputCounts]:
        """Counts by the name of the input."""
        return self.seen.inputs

    def whole(self) -> InputCounts:
        return together(self.inputs)

    def row(self, k: str, dense_loss: float) -> dict[str, Value]:
        """Return the line of the table; without spikes the figures of counts are missing."""
        row: dict[str, Value] = {
            "source": "this model",
            "k": k,
            "perplexity": math.exp(min(self.loss, 700.0)),
            "ratio": math.exp(min(self.loss - dense_loss, 700.0)),
        }
        found: Mapping[str, float] = self.whole().statistics() if self.inputs else {}
        row |= {key: found.get(key) for key in _KEYS}
        pj = mean_energy(self.seen)
        return row | {
            "spiked_macs": self.whole().macs / self.seen.macs,
            "pj_per_mac": pj, "fp16_over_it": FP16_MAC / pj, "int8_over_it": INT8_MAC / pj
        }  # fmt: skip

    def tables(self, k: str) -> dict[str, list[dict[str, Value]]]:
        """Return the figures by coding, by kind of input and by input."""
        kinds = dict.fromkeys(map(kind, self.inputs))
        return {
            f"by coding, k = {k}": _by_coding(self.whole()),
            f"by kind of input, k = {k}": [
                _input_row(pattern, together(self.inputs, pattern)) for pattern in kinds
            ],
            f"by input, k = {k}": [_input_row(*item) for item in self.inputs.items()],
        }


_KEYS = (
    "sparsity_all", "sparsity_within_7", "mean_spikes", "share_silent", "share_within_7",
    "share_above_16",
)  # fmt: skip


class _Reader:
    """Measures settings on the same text."""

    def __init__(self, restored: Restored, pieces: Sequence[Piece]) -> None:
        self._restored, self._pieces = restored, pieces
        self._scorer = Scorer(restored.model, restored.config.ops)
        self._progress = Progress("suite=spikes")
        self._tokens_read = 0

    def set(self, setting: SpikeConfig) -> None:
        model = self._restored.model
        set_spiking(model, setting, num_sinks=model.config.num_sinks)

    def measure(self, setting: SpikeConfig) -> Measured:
        self.set(setting)
        with SpikeObserver(self._restored.model) as seen:
            scores = [score for _, score in self._scorer.score(self._pieces, batch_tokens=4096)]
        losses = np.concatenate([score.losses for score in scores])
        self._tokens_read += len(losses)
        self._progress.report(self._tokens_read, "tokens", f"last loss {losses.mean():.4f}")
        return Measured(float(losses.mean(dtype=np.float64)), seen)

    def halves(self) -> tuple["_Reader", "_Reader"]:
        middle = len(self._pieces) // 2
        if not middle:
            raise ValueError(
                "suites.spikes.target_sparsity needs two windows, to look for a setting and to try "
                "it; use a smaller suites.spikes.seq_len or more text"
            )
        parts = self._pieces[:middle], self._pieces[middle:]
        first, second = (_Reader(self._restored, part) for part in parts)
        return first, second


def _cut(pieces: Iterable[Piece], max_tokens: int) -> list[Piece]:
    kept: list[Piece] = []
    for piece in pieces:
        n = min(piece.num_predicted, max_tokens)
        if n < 1:
            break
        cut = len(piece.tokens) - (piece.num_predicted - n)
        kept.append(Piece(piece.tokens[:cut], n))
        max_tokens -= n
    return kept


def _input_row(name: str, counts: InputCounts) -> dict[str, Value]:
    found = counts.statistics()
    row: dict[str, Value] = {"input": name, "layer": next(iter(_layers(name)), None)}
    row |= {key: found[key] for key in _KEYS}
    pj = energy_per_mac(found["mean_spikes"])
    return row | {
        "largest": counts.most(), "rms_error": counts.relative_error, "macs": counts.macs,
        "pj_per_mac": pj,
    }  # fmt: skip


def _layers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def _by_coding(counts: InputCounts) -> list[dict[str, Value]]:
    rows: list[dict[str, Value]] = []
    for coding in CODINGS:
        steps, spikes = counts.spikes(coding, counts.most())
        few_steps, few_spikes = counts.spikes(coding, 7)
        pj = energy_per_mac(spikes)
        rows.append(
            {
                "coding": coding,
                "steps": steps,
                "mean_spikes": spikes,
                "sparsity": 1 - spikes / steps,
                "steps_within_7": few_steps,
                "sparsity_within_7": 1 - few_spikes / few_steps,
                "pj_per_mac": pj,
                "fp16_over_it": FP16_MAC / pj if pj else None,
                "int8_over_it": INT8_MAC / pj if pj else None,
            }
        )
    return rows


def _published(like: Mapping[str, Value]) -> list[dict[str, Value]]:
    """Return the report's figures as lines of the same table."""
    rows = []
    for point in PUBLISHED_SPIKES["trade_off"]:
        row: dict[str, Value] = dict.fromkeys(like)
        row |= {"source": "report", "k": f"{point['k']:g}"}
        row["sparsity_within_7"] = point["sparsity_3_steps"]
        row["share_within_7"] = point["share_within_7"]
        if point["k"] == PUBLISHED_SPIKES["k"]:
            row |= {key: PUBLISHED_SPIKES[key] for key in ("mean_spikes", "share_silent")}
            row |= {"share_above_16": PUBLISHED_SPIKES["share_above_16"]}
            row |= {"pj_per_mac": PUBLISHED_MAC, "fp16_over_it": 43.5, "int8_over_it": 6.8}
        rows.append(row)
    return rows


def _draw(rows: Sequence[Mapping[str, Value]], shown: Measured, k: str) -> dict[str, str]:
    """Draw trade-off, counts, layers, and the raster of an input in the middle of the model."""
    entries = [_input_row(name, counts) for name, counts in shown.inputs.items()]
    histogram = spike_statistics(shown.whole().histogram)["histogram"]
    assert isinstance(histogram, list), "shares by count"
    name = list(shown.inputs)[len(shown.inputs) // 2]
    counts = shown.inputs[name].last
    figures = {
        "trade_off": plots.spike_sweep([dict(row) for row in rows if row["k"] != "off"]),
        "counts": plots.count_histogram(histogram),
        "layers": plots.spikes_by_layer([dict(e) for e in entries], PUBLISHED_SPIKES),
    }
    if counts is not None:
        some = counts[:RASTER_CHANNELS].long().tolist()
        figures["raster"] = plots.spike_raster(some, f"{name}, k = {k}, one token")
    return figures
