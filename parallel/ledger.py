"""The communication ledger: calls and bytes sent by this rank, per axis, collective and kind."""

from dataclasses import dataclass, field


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

    def summary(self) -> dict[str, dict[str, dict[str, object]]]:
        """Return {axis: {collective: figures}}: calls, bytes and seconds, whole and per step.

        `by_kind` holds the same figures for each kind of layer that asked for the collective.
        """
        whole: dict[tuple[str, str], Entry] = {}
        kinds: dict[tuple[str, str], dict[str, object]] = {}
        for (axis, collective, kind), entry in sorted(self.entries.items()):
            whole.setdefault((axis, collective), Entry()).add(entry)
            if kind:
                kinds.setdefault((axis, collective), {})[kind] = self._figures(entry)
        result: dict[str, dict[str, dict[str, object]]] = {}
        for (axis, collective), entry in whole.items():
            by_kind = kinds.get((axis, collective), {})
            figures = self._figures(entry) | ({"by_kind": by_kind} if by_kind else {})
            result.setdefault(axis, {})[collective] = figures
        return result

    def _entry(self, axis: str, collective: str, kind: str) -> Entry:
        return self.entries.setdefault((axis, collective, kind), Entry())

    def _figures(self, entry: Entry) -> dict[str, object]:
        steps = max(self.steps, 1)
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
