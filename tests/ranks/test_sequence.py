"""Every sequence-parallel algorithm computes what one rank does: outputs and all gradients."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.pairs import all_pairs
from helpers.ranks import Setting
from helpers.recurrent import assert_all_close
from helpers.sequence import WEIGHTS, Options, Problem, compute, define

ONE_RANK = Setting()

DOCUMENTS = (
    (101,),  # on all ranks
    (20, 50, 1, 30),
    (3, 97, 1),
    (48, 24, 24),  # bounds between segments: queries that see nothing of another rank
    (33, 1, 1, 1, 1, 1, 63),
    (2, 1, 14),  # one or two tokens in a segment
)
SEGMENTS = (
    Setting(1, 2),
    Setting(1, 2, "zigzag"),
    Setting(1, 3),
    Setting(1, 3, "zigzag"),
    Setting(1, 4),
    Setting(1, 4, "zigzag"),
    Setting(2, 2, "zigzag"),
)
DECAYS = ("none", "scalar", "vector", "scalar-50", "vector-inf")
SINKS = (0, 3)

AXES: dict[str, dict[str, tuple[Any, ...]]] = {
    "full": {
        "setting": (*SEGMENTS, Setting(2, 1), Setting(3, 1, "zigzag"), Setting(4, 1)),
        "documents": DOCUMENTS,
        "heads": ((6, 2), (5, 5), (4, 1)),
        "sinks": SINKS,
        "factor": (1.0, 50.0),
    },
    "window": {
        "setting": SEGMENTS,
        "documents": DOCUMENTS,
        "size": (7, 40, 2, 200, 1),  # tokens from the rank before, several, one, all, none
        "sinks": SINKS,
        "heads": ((6, 2), (5, 5)),
    },
    "linear": {
        "setting": SEGMENTS,
        "linear": ("gather", "scan"),
        "documents": DOCUMENTS,
        "decay": DECAYS,
        "sinks": SINKS,
        "heads": ((6, 2), (2, 2)),
    },
    "delta": {
        "setting": SEGMENTS,
        "linear": ("gather", "scan"),
        "documents": DOCUMENTS,
        "decay": DECAYS,
        "sinks": SINKS,
        "heads": ((6, 2), (2, 2)),
    },
    "conv": {
        "setting": SEGMENTS,
        "documents": DOCUMENTS,
        "size": (4, 2, 8),
        "sinks": SINKS,
    },
}

PACKED = (20, 50, 1, 30)
BOTH = Setting(2, 2, "zigzag", "scan")
OF_EACH_MIXER = (
    Problem("full", PACKED, 3),
    Problem("window", PACKED, 3, size=40),
    Problem("linear", PACKED, 3, decay="vector"),
    Problem("delta", PACKED, 3, decay="scalar"),
    Problem("conv", PACKED, 3, size=4),
)
each_mixer = pytest.mark.parametrize("problem", OF_EACH_MIXER, ids=lambda problem: problem.mixer)

LARGE = Setting(2, 4, "zigzag")
EIGHT_RANKS = [
    (Problem("full", PACKED, 3), LARGE),
    (Problem("window", (3, 98), 0, size=40), LARGE),
    (Problem("linear", (3, 98), 3, decay="vector"), LARGE._replace(linear="scan")),
]


def name_case(case: Any) -> str:
    return case.id if isinstance(case, Setting) else str(case)


def rows() -> list[tuple[Problem, Setting]]:
    cases = []
    for mixer, axes in AXES.items():
        for row in all_pairs(axes):
            setting = row.pop("setting")._replace(linear=row.pop("linear", "gather"))
            cases.append((Problem(mixer, **row), setting))  # type: ignore[arg-type]
    return cases + EIGHT_RANKS


@functools.cache
def expected(problem: Problem) -> dict[str, torch.Tensor]:
    """Return the result by the definition, which one rank is compared with once."""
    results, _ = compute(problem, ONE_RANK)
    assert_all_close(results, define(problem), problem.dtype)
    return define(problem)


@pytest.mark.parametrize(("problem", "setting"), rows(), ids=name_case)
def test_equals_one_rank(problem: Problem, setting: Setting) -> None:
    results, _ = compute(problem, setting)
    assert_all_close(results, expected(problem), problem.dtype)


@pytest.mark.parametrize("tokens", [(0, 20), (71, 101), (71, 71)], ids=str)
@each_mixer
def test_loss_may_depend_on_few_tokens(problem: Problem, tokens: tuple[int, int]) -> None:
    """A rank whose own tokens are not in the loss takes part in the others' backward pass."""
    problem = replace(problem, loss=tokens)
    results, _ = compute(problem, Setting(1, 4))
    assert_all_close(results, expected(problem), problem.dtype)


@each_mixer
def test_gradient_of_one_input_alone(problem: Problem) -> None:
    everything = define(problem)
    for name in everything.keys() - {"out"}:
        results, _ = compute(problem, BOTH, Options(wanted=(name[1:],)))
        assert_all_close(results, {n: everything[n] for n in ("out", name)}, problem.dtype)


@each_mixer
def test_float32_equals_one_rank(problem: Problem) -> None:
    problem = replace(problem, dtype=torch.float32)
    results, _ = compute(problem, BOTH)
    assert_all_close(results, expected(problem), problem.dtype)


@pytest.mark.parametrize("setting", [BOTH, Setting(1, 4, "contiguous", "gather")], ids=name_case)
@each_mixer
def test_bfloat16_is_as_exact_as_on_one_rank(problem: Problem, setting: Setting) -> None:
    problem = replace(problem, dtype=torch.bfloat16)
    results, _ = compute(problem, setting)
    exact = expected(problem)
    assert_all_close(results, exact, problem.dtype)
    on_one_rank, _ = compute(problem, ONE_RANK)
    for name in exact:
        # Of a weight's gradient each rank rounds its part.
        allowed = 2.0 if name[1:] in WEIGHTS else 1.3
        error, before = (
            (x[name].double() - exact[name]).norm() / exact[name].norm()
            for x in (results, on_one_rank)
        )
        assert error < allowed * before, f"{name}: {error:.2e}, on one rank {before:.2e}"


def test_ring_rounds_its_result_once() -> None:
    """Rounded to 16 bits at each of eight merges, the error would be a tenth larger.

    With sinks, so that one rank merges as well.
    """
    problem = Problem("full", (320,), 3, dtype=torch.bfloat16)
    exact = define(problem)["out"]
    error, before = (
        (compute(problem, setting)[0]["out"].double() - exact).norm()
        for setting in (Setting(1, 8), ONE_RANK)
    )
    assert error < 1.05 * before


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("mixer", ["full", "window", "linear", "conv"])
def test_pinned_operators_compute_the_parts(mixer: Any, impl: str) -> None:
    decay = "vector" if mixer == "linear" else "none"
    problem = Problem(mixer, (21,), heads=(2, 1), decay=decay, dtype=torch.float32)
    results, _ = compute(problem, Setting(1, 2, "zigzag", "scan"), Options(impl))
    assert_all_close(results, define(problem), problem.dtype)


@pytest.mark.parametrize("sync", ["device", "barrier"])
@each_mixer
def test_synchronization_changes_nothing(problem: Problem, sync: str) -> None:
    results, parts = compute(problem, BOTH, Options(sync=sync))
    assert_all_close(results, expected(problem), problem.dtype)
    for part in parts:
        for ledger in part.ledgers:
            barriers = [c for _, c, _ in ledger.entries if c == "barrier"]
            assert bool(barriers) == (sync == "barrier")


@pytest.mark.parametrize("setting", [BOTH, BOTH._replace(linear="gather")], ids=name_case)
@each_mixer
def test_recomputation_does_not_communicate_again(problem: Problem, setting: Setting) -> None:
    """But for Ulysses, whose heads would fill the memory that recomputation is to save."""
    _, parts = compute(problem, setting)
    results, again = compute(problem, setting, Options(recompute=True))
    assert_all_close(results, expected(problem), problem.dtype)
    for part, other in zip(parts, again, strict=True):
        for ledger, recomputed in zip(part.ledgers, other.ledgers, strict=True):
            assert ledger.entries.keys() == recomputed.entries.keys()
            for (axis, collective, kind), entry in ledger.entries.items():
                now = recomputed.entries[axis, collective, kind]
                if axis == "ulysses" and ledger is part.ledgers[1]:
                    assert now.calls > entry.calls
                else:
                    assert (now.calls, now.bytes) == (entry.calls, entry.bytes), collective
