"""The ledger holds what the formulas of the algorithms say, for each rank, forward and backward."""

import functools
from typing import NamedTuple

import pytest
import torch
from helpers.ranks import Setting, run_ranks
from helpers.sequence import CHANNELS, D_V, D, Options, Problem, compute_part

from parallel.ledger import Ledger
from parallel.mesh import World

T, H, H_KV = 64, 6, 2
BF16 = torch.bfloat16
FLOAT32_BYTES, BF16_BYTES = 4, 2
WINDOW, TAPS = 4, 4
WIDE_WINDOW = 20

PROBLEMS = {
    "full": Problem("full", (T,), heads=(H, H_KV), dtype=BF16),
    "window": Problem("window", (T,), heads=(H, H_KV), size=WINDOW, dtype=BF16),
    "wide-window": Problem("window", (T,), heads=(H, H_KV), size=WIDE_WINDOW, dtype=BF16),
    "conv": Problem("conv", (T,), size=TAPS, dtype=BF16),
    "linear-none": Problem("linear", (T,), heads=(H, H_KV), dtype=BF16),
    "linear-scalar": Problem("linear", (T,), heads=(H, H_KV), decay="scalar", dtype=BF16),
    "linear-vector": Problem("linear", (T,), heads=(H, H_KV), decay="vector", dtype=BF16),
    "delta": Problem("delta", (T,), heads=(H, H_KV), decay="vector", dtype=BF16),
}
every_size = pytest.mark.parametrize("P", [2, 4, 8])
every_layout = pytest.mark.parametrize("layout", ["contiguous", "zigzag"])


class Sent(NamedTuple):
    """Bytes that each rank sends."""

    forward: list[int]
    backward: list[int]


def sent(name: str, P: int, *, layout: str = "contiguous", linear: str = "gather") -> Sent:
    """Return what a problem sends; ring, but for `ulysses`."""
    if name == "ulysses":
        setting, name = Setting(P, 1, layout, linear), "full"
    else:
        setting = Setting(1, P, layout, linear)
    ledgers = [rank[name, setting] for rank in _run_all(P)]
    totals = [[sum(e.bytes for e in x.entries.values()) for x in pair] for pair in ledgers]
    return Sent(*(list(of_ranks) for of_ranks in zip(*totals, strict=True)))


@functools.cache
def _run_all(P: int) -> list[dict[tuple[str, Setting], tuple[Ledger, Ledger]]]:
    return run_ranks(P, run_all, P)


def run_all(world: World, P: int) -> dict[tuple[str, Setting], tuple[Ledger, Ledger]]:
    """Run all problems in all settings, one after another."""
    cases = [("full", Setting(P, 1, layout)) for layout in ("contiguous", "zigzag")]
    cases += [
        (name, Setting(1, P, layout, linear))
        for name, problem in PROBLEMS.items()
        for layout in ("contiguous", "zigzag")
        for linear in (("gather", "scan") if problem.mixer in ("linear", "delta") else ("gather",))
    ]
    return {
        (name, setting): compute_part(world, PROBLEMS[name], setting, Options()).ledgers
        for name, setting in cases
    }


@every_layout
@pytest.mark.parametrize(("P", "padded_heads"), [(2, 6), (4, 8), (8, 8)])
def test_ulysses(P: int, padded_heads: int, layout: str) -> None:
    """(P-1)/P n d b (2 Hp + 2 max(P, Hkv)), backward as much."""
    expected = (P - 1) * (T // P) * D * BF16_BYTES * (2 * padded_heads + 2 * max(P, H_KV)) // P
    assert sent("ulysses", P, layout=layout) == Sent([expected] * P, [expected] * P)


@every_layout
@every_size
def test_ring(P: int, layout: str) -> None:
    """(P-1) 2 n Hkv d b, and P 2 n Hkv d 4 more backward."""
    n = T // P
    forward = (P - 1) * 2 * n * H_KV * D * BF16_BYTES
    backward = forward + P * 2 * n * H_KV * D * FLOAT32_BYTES
    assert sent("full", P, layout=layout) == Sent([forward] * P, [backward] * P)


@every_size
@pytest.mark.parametrize(
    ("name", "row_bytes"),
    [
        ("window", (WINDOW - 1) * 2 * H_KV * D * BF16_BYTES),
        ("conv", (TAPS - 1) * CHANNELS * BF16_BYTES),
    ],
)
def test_halo(name: str, row_bytes: int, P: int) -> None:
    """(w-1) 2 Hkv d b, backward as much the other way; twice that in zigzag at most."""
    assert sent(name, P) == Sent(
        [row_bytes] * (P - 1) + [0],
        [0] + [row_bytes] * (P - 1),
    )
    zigzag = sent(name, P, layout="zigzag")
    # The first rank ends the sequence and the last one holds its middle: one bound less each.
    inner = [2 * row_bytes] * (P - 2)
    assert zigzag == Sent([row_bytes, *inner, row_bytes], [row_bytes, *inner, row_bytes])


@every_size
def test_halo_over_several_ranks(P: int) -> None:
    """Rank r takes the last min(r n, w - 1) tokens before its own, each from its owner."""
    tokens = sum(min(r * T // P, WIDE_WINDOW - 1) for r in range(P))
    measured = sent("wide-window", P)
    expected = tokens * 2 * H_KV * D * BF16_BYTES
    assert (sum(measured.forward), sum(measured.backward)) == (expected, expected)


@pytest.mark.parametrize(("layout", "segments"), [("contiguous", 1), ("zigzag", 2)])
@every_size
@pytest.mark.parametrize(
    ("name", "transition"),
    [
        ("linear-none", 0),
        ("linear-scalar", 1),
        ("linear-vector", D),
        ("delta", D * D),
    ],
)
def test_state_gather(name: str, transition: int, P: int, layout: str, segments: int) -> None:
    """(P-1) H (dk dv + dk) 4 forward. Backward the decay is held: (P-1) H dk dv 4.

    A scalar decay is one number and not dk, the delta rule's transition a matrix [dk, dk].
    """
    forward = segments * (P - 1) * H_KV * (D * D_V + transition) * FLOAT32_BYTES
    backward = segments * (P - 1) * H_KV * D * D_V * FLOAT32_BYTES
    assert sent(name, P, layout=layout) == Sent([forward] * P, [backward] * P)


@every_size
@pytest.mark.parametrize("name", ["linear-none", "linear-scalar", "linear-vector", "delta"])
def test_state_scan(name: str, P: int) -> None:
    """H dk dv 4 once, whatever P; the last rank sends 0, backward the first.

    In zigzag once for each segment, but for the one that ends the sequence and the one whose next
    is on the same rank.
    """
    state = H_KV * D * D_V * FLOAT32_BYTES
    measured = sent(name, P, linear="scan")
    assert measured == Sent([state] * (P - 1) + [0], [0] + [state] * (P - 1))
    inner = [2 * state] * (P - 2)
    zigzag = sent(name, P, layout="zigzag", linear="scan")
    assert zigzag == Sent([state, *inner, state], [state, *inner, state])
