"""What every suite shares: the row it reports and the fair way to time two sides."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One figure; the peer's fields are None where there is none."""

    case: str
    metric: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    """In our favour when above 1."""

    def __str__(self) -> str:
        peer = "" if self.peer_value is None else f"{self.peer_value:.4g}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        return (
            f"{self.case:52s} {self.metric:18s} {self.value:12.4g} {peer:>12s} {ratio:>7s}  "
            f"{self.unit} ({self.peer or 'none'})"
        )


HEADER = f"{'case':52s} {'metric':18s} {'ours':>12s} {'peer':>12s} {'ratio':>7s}  unit (peer)"


def median_seconds(
    sides: Sequence[Callable[[], object]],
    repeats: int,
    synchronize: Callable[[], object] = lambda: None,
) -> list[float]:
    """Time the sides in turn, A B A B ..., after one warm-up each; return each side's median.

    `synchronize` waits for a device that computes on its own.
    """
    for side in sides:
        side()
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, taken in zip(sides, seconds, strict=True):
            synchronize()
            start = time.perf_counter()
            side()
            synchronize()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]
