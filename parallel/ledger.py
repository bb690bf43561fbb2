"""The communication ledger: calls and bytes sent by this rank, per axis and collective."""

from dataclasses import dataclass, field


@dataclass
class Entry:
    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass
class Ledger:
    """Counts what this rank sends: payload bytes, without protocol overhead."""

    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    steps: int = 0

    def record(
        self, axis: str, collective: str, num_bytes: int, seconds: float = 0.0, calls: int = 1
    ) -> None:
        """Add calls of `collective` on the ranks of `axis`: bytes sent in all, seconds waited."""
        entry = self.entries.setdefault((axis, collective), Entry())
        entry.calls += calls
        entry.bytes += num_bytes
        entry.seconds += seconds

    def seconds(self) -> float:
        """Return the seconds spent in collectives so far."""
        return sum(entry.seconds for entry in self.entries.values())

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return {axis: {collective: calls, bytes and seconds, whole and per step}}."""
        steps = max(self.steps, 1)
        result: dict[str, dict[str, dict[str, float]]] = {}
        for (axis, collective), entry in sorted(self.entries.items()):
            result.setdefault(axis, {})[collective] = {
                "calls_per_step": entry.calls / steps,
                "bytes_per_step": entry.bytes / steps,
                "seconds_per_step": entry.seconds / steps,
                "calls": entry.calls,
                "bytes": entry.bytes,
            }
        return result
