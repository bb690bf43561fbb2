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


def median_seconds(sides: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """Time the sides in turn, A B A B ..., after one warm-up each; return each side's median."""
    for side in sides:
        side()
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, taken in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            side()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]
