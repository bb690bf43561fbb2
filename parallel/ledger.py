"""The communication ledger: calls and bytes sent by this rank, per axis, collective and kind."""

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field


@dataclass
class Entry:
    """What one collective did for one kind of layer."""

    calls: int = 0
    bytes: int = 0
    predicted_bytes: int | None = None
    """By the formulas of `parallel.cost`; None where there is none."""
    seconds: float = 0.0
    """Spent waiting."""

    def add(self, other: "Entry") -> None:
        self.calls += other.calls
        self.bytes += other.bytes
        self.seconds += other.seconds
        if other.predicted_bytes is not None:
            self.predicted_bytes = (self.predicted_bytes or 0) + other.predicted_bytes


@dataclass
class Ledger:
    """Counts what this rank sends: payload bytes, without protocol overhead."""

    entries: dict[tuple[str, str, str], Entry] = field(default_factory=dict)
    """By axis, collective and kind of layer, which is empty for what no layer asked for."""
    steps: int = 0
    spared_bytes: int = 0
    """What the rank would have sent besides, by the formulas, without copies of hot experts; less
    than none where it has paid for the copies of others."""

    def record(
        self,
        axis: str,
        collective: str,
        num_bytes: int,
        seconds: float = 0.0,
        calls: int = 1,
        kind: str = "",
    ) -> None:
        """Add calls of `collective` on the ranks of `axis`: bytes sent in all, seconds waited."""
        self._entry(axis, collective, kind).add(Entry(calls, num_bytes, None, seconds))

    def predict(self, axis: str, collective: str, kind: str, num_bytes: int) -> None:
        """Add what the formulas say will be sent."""
        self._entry(axis, collective, kind).add(Entry(predicted_bytes=num_bytes))

    def seconds(self) -> float:
        """Return the seconds spent in collectives so far."""
        return sum(entry.seconds for entry in self.entries.values())

    def bytes_on(self, axis: str) -> int:
        """Return the bytes sent on the ranks of `axis`."""
        return sum(entry.bytes for key, entry in self.entries.items() if key[0] == axis)

    def dump(self) -> str:
        """Return all entries as text, for another rank to `load`."""
        rows = [[*key, *astuple(entry)] for key, entry in self.entries.items()]
        return json.dumps([self.steps, self.spared_bytes, rows])

    @classmethod
    def load(cls, text: str) -> "Ledger":
        """Return the ledger of a `dump`."""
        steps, spared_bytes, rows = json.loads(text)
        return cls({tuple(row[:3]): Entry(*row[3:]) for row in rows}, steps, spared_bytes)

    def summary(self, ledgers: Sequence["Ledger"] = ()) -> dict[str, dict[str, dict[str, object]]]:
        """Return {axis: {collective: figures}}: calls, bytes and seconds, whole and per step.

        `by_kind` holds the same figures for each kind of layer that asked for the collective, and
        `all_ranks`, in either, what the ranks sent together. What one rank alone had to do with has
        zeros here.

        Args:
            ledgers: of all ranks, this one's included.
        """
        own, steps = self._totals(), max(self.steps, 1)
        totals = [ledger._totals() for ledger in ledgers] or [own]
        result: dict[str, dict[str, dict[str, object]]] = {}
        for key in sorted(set().union(*totals)):
            axis, collective, kind = key
            foreseen = any(key in t and t[key].predicted_bytes is not None for t in totals)
            nothing = Entry(predicted_bytes=0 if foreseen else None)
            figures = _figures(own.get(key, nothing), steps)
            if ledgers:
                figures["all_ranks"] = _over_ranks([t.get(key, nothing) for t in totals], steps)
            whole = result.setdefault(axis, {}).setdefault(collective, figures)
            if kind:
                kinds = whole.setdefault("by_kind", {})
                assert isinstance(kinds, dict)
                kinds[kind] = figures
        return result

    def _totals(self) -> dict[tuple[str, str, str], Entry]:
        """Return the entries of kinds of layers, and under the empty kind the sum of all."""
        totals: dict[tuple[str, str, str], Entry] = {}
        for (axis, collective, kind), entry in self.entries.items():
            if kind:
                totals[axis, collective, kind] = entry
            totals.setdefault((axis, collective, ""), Entry()).add(entry)
        for (axis, collective, _), entry in self.entries.items():
            if entry.predicted_bytes is None:  # what is foreseen of the whole is not all of it
                totals[axis, collective, ""].predicted_bytes = None
        return totals

    def _entry(self, axis: str, collective: str, kind: str) -> Entry:
        return self.entries.setdefault((axis, collective, kind), Entry())


def _figures(entry: Entry, steps: int) -> dict[str, object]:
    predicted = entry.predicted_bytes
    return {
        "calls_per_step": entry.calls / steps,
        "bytes_per_step": entry.bytes / steps,
        "predicted_bytes_per_step": None if predicted is None else predicted / steps,
        "seconds_per_step": entry.seconds / steps,
        "calls": entry.calls,
        "bytes": entry.bytes,
        "predicted_bytes": predicted,
    }


def _over_ranks(entries: list[Entry], steps: int) -> dict[str, object]:
    """Return the figures of one collective over the ranks."""
    num_bytes = [entry.bytes for entry in entries]
    predicted = [entry for entry in entries if entry.predicted_bytes is not None]
    return {
        "bytes_per_step": sum(num_bytes) / steps,
        "most_bytes_per_step": max(num_bytes) / steps,
        "most_seconds_per_step": max(entry.seconds for entry in entries) / steps,
        "bytes": sum(num_bytes),
        "predicted_bytes": sum(e.predicted_bytes or 0 for e in predicted) if predicted else None,
        "ranks_off": sum(e.bytes != e.predicted_bytes for e in predicted) if predicted else None,
    }
