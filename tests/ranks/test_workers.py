"""The workers of the tests: what fails on one rank is told at once and leaves nothing behind."""

import os
import signal
import time

import pytest
import torch
from helpers.pairs import all_pairs
from helpers.ranks import Setting, build_context, run_ranks

from parallel.mesh import World

CU_SEQLENS = torch.tensor([0, 12], dtype=torch.int32)


def work(world: World, fault: str) -> tuple[int, float]:
    """Return the rank and the sum over all, but for the rank with the fault."""
    context = build_context(world, Setting(1, world.world_size), CU_SEQLENS)
    if world.rank == 1 and fault == "raises":
        raise ZeroDivisionError("on purpose")
    if world.rank == 1 and fault == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    total = context.comm.all_reduce_sum(torch.ones(()), context.comm.mesh.sp)
    return world.rank, total.item()


def sleep(world: World, seconds: float) -> str:
    time.sleep(seconds)
    return "late"


@pytest.mark.parametrize(
    ("fault", "told"),
    [("raises", "rank 1: .*ZeroDivisionError"), ("dies", "rank 1: .*exit code -9")],
)
def test_failure_of_one_rank_ends_all_at_once(fault: str, told: str) -> None:
    run_ranks(3, work, "none")
    start = time.monotonic()
    with pytest.raises(AssertionError, match=f"(?s)^[^\n]*{told}"):
        run_ranks(3, work, fault)
    assert time.monotonic() - start < 10, "nobody waited for a timeout"
    assert run_ranks(3, work, "none") == [(0, 3.0), (1, 3.0), (2, 3.0)]


def test_answers_of_an_interrupted_job_are_not_those_of_the_next() -> None:
    def interrupt(signal_number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    run_ranks(2, sleep, 0.0)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            run_ranks(2, sleep, 30.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert run_ranks(2, work, "none") == [(0, 2.0), (1, 2.0)]


def test_unwritten_memory_is_poisoned_in_workers() -> None:
    assert all(run_ranks(2, is_poisoned))


def is_poisoned(world: World) -> bool:
    return bool(torch.empty(3).isnan().all())


def test_all_pairs_meet() -> None:
    axes = {"a": (1, 2, 3), "b": "xyzw", "c": (True, False), "d": (None, 0.5)}
    rows = all_pairs(axes)
    for first in axes:
        for second in axes:
            if first != second:
                met = {(row[first], row[second]) for row in rows}
                assert len(met) == len(axes[first]) * len(axes[second])
    assert len(rows) <= 14, "12 at least"
