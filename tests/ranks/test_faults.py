"""A rank is killed or stopped or never comes: the others end in time and say who and where."""

import functools
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers.runs import Faults, Run, column, run_ranks, start_ranks, tiny

from parallel.comm import Comm
from parallel.mesh import Axis, Mesh

TIMEOUT, MARGIN = 3.0, 3.0
"""Seconds of one collective; and what a busy machine may need beyond them."""

LAYERS = (
    "+mixer@model.mixers.full=full_attention", "model.mixers.full.num_heads=2",
    "model.mixers.full.num_kv_heads=1", "model.mixers.full.head_dim=16", "model.num_layers=2",
    "model.layers=[{mixers:[linear],ffn:dense},{mixers:[full],ffn:dense}]",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The last rank halts; what the others tell."""

    signal: str
    collective: str
    """At the start of which it halts."""
    told: str
    """What another rank waits for then."""
    overrides: tuple[str, ...] = ()
    step: int = 2
    num_ranks: int = 2


CASES = {
    "ring": Case(
        "SIGSTOP", "ring, step 2 of 2",
        "ring, step . of 2 of the keys, of layers.1 (full_attention) "
        "on axis ring", ("parallel.ring=3",), num_ranks=3,
    ),
    "ring-backward": Case(
        "SIGKILL", "ring, step 1 of 2 of the gradients",
        "ring, step . of 2 of the gradients, of layers.1 (full_attention) on axis ring",
        ("parallel.ring=2", "parallel.layout=zigzag", "parallel.zero_stage=1"),
    ),
    "all-to-all": Case(
        "SIGKILL", "all_to_all", "all_to_all of layers.1 (full_attention) on axis ulysses",
        ("parallel.ulysses=2", "parallel.zero_stage=3"),
    ),
    "scan": Case(
        "SIGKILL", "state_scan", "state_scan, step 1 of 2, of layers.0 (linear_attention) on axis "
        "sp", ("parallel.ring=2", "parallel.linear=scan", "parallel.layout=zigzag"),
    ),
    "gradients": Case(
        "SIGSTOP", "gradient reduction",
        "gradient reduction of the backward pass (DeepSpeed, ZeRO 2)", ("parallel.zero_stage=2",),
    ),
    "optimizer": Case(
        "SIGKILL", "optimizer step", "optimizer step (DeepSpeed, ZeRO 1)",
        ("parallel.zero_stage=1",),
    ),
    "start": Case(
        "SIGSTOP", "start of DeepSpeed", "start of DeepSpeed (DeepSpeed, ZeRO 0)", step=0,
    ),
    "checkpoint": Case(
        "SIGKILL", "gather of", "gather of embed.weight (DeepSpeed, ZeRO 3)",
        ("parallel.zero_stage=3",), step=1,
    ),
}  # fmt: skip


def train(folder: Path, name: str, *overrides: str) -> list[str]:
    timeout = f"parallel.timeout_seconds={TIMEOUT}"
    fixed = (f"run.dir={name}", "run.steps=3", "checkpoint.every=1", "evaluation.every=9", timeout)
    return tiny(folder, *LAYERS, *fixed, *overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@dataclass(frozen=True)
class Failure:
    """What is left of a case."""

    survivors: list[Run]
    halted: Run
    notes: list[dict[str, Any]]
    """Of the flight recorder of each rank, before a stopped one continued."""


@pytest.fixture(scope="module")
def fail(folder: Path) -> Callable[[str], Failure]:
    """Run a case until all its ranks have ended; a stopped one continues when it is alone."""

    @functools.cache
    def run_case(name: str) -> Failure:
        case = CASES[name]
        fault = Faults(halt=(case.signal, case.collective, case.step))
        faults = [*[None] * (case.num_ranks - 1), fault]
        *survivors, halted = start_ranks(train(folder, name, *case.overrides), folder, faults)
        codes = [run.wait() for run in survivors]
        files = sorted((folder / name / "flight_recorder").iterdir())
        notes = [json.loads(path.read_text()) for path in files]
        if case.signal == "SIGSTOP":
            os.kill(halted.process.pid, signal.SIGCONT)
            assert halted.wait() == 3
        assert codes == [3] * len(survivors), survivors[0].log
        return Failure(survivors, halted, notes)

    return run_case


def last_words(run: Run) -> list[str]:
    """Return the lines that tell of the failure."""
    lines = run.log.splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"rank \d: (in|before|the) ", line)]
    assert len(starts) == 1, run.log
    assert "Traceback" not in run.log, run.log
    return lines[starts[0] :]


@pytest.mark.parametrize("name", CASES)
def test_survivors_say_who_where_and_what_was_done(
    fail: Callable[[str], Failure], name: str
) -> None:
    case, failure = CASES[name], fail(name)
    survivors, notes, culprit = failure.survivors, failure.notes, case.num_ranks - 1
    assert notes[culprit]["pending"].startswith(case.collective)
    is_stopped = case.signal == "SIGSTOP"
    limit = (TIMEOUT if is_stopped else 0) + MARGIN
    place = f"in step {case.step}, " if case.step else "before the first step, "
    told = re.escape(case.told).replace(r"step\ \.", "step [0-9]")
    waited = r"no answer in [0-9.]+ s \(parallel.timeout_seconds is the limit\)"
    gone = "a rank it talks to is gone, its connection is closed"
    for rank, run in enumerate(survivors):
        lines = last_words(run)
        reason = f"({waited}|{gone})" if is_stopped else gone
        assert re.fullmatch(f"rank {rank}: {place}{told} failed: {reason}", lines[0]), run.log
        assert 0 <= notes[rank]["time"] - notes[culprit]["time"] < limit
        for other, note in enumerate(notes):
            done = f"{note['completed']} (collective {note['count']}, in step {note['step']})"
            assert lines[1 + other].startswith(f"  rank {other}: last completed {done}")
        state = "stopped" if is_stopped else "gone"
        assert lines[1 + culprit].endswith(f" s in {notes[culprit]['pending']}, process is {state}")
        assert lines[-2] == f"  most likely at fault: rank {culprit}, whose process is {state}"
        saved = f"{name}/checkpoints/step_{case.step - 1:08d}" if case.step > 1 else "none was"
        assert lines[-1].startswith(f"  last complete checkpoint: {saved}")
    assert any("no answer" in run.log for run in survivors) == is_stopped
    if is_stopped:
        assert last_words(failure.halted)[-2].endswith("this one, or the network")


def test_rank_that_never_comes(folder: Path) -> None:
    arguments = train(folder, "absent", "parallel.timeout_seconds=2")
    with_first, _ = started = start_ranks(arguments, folder, (None, None))
    _, with_second = others = start_ranks(arguments, folder, (None, None))
    started[1].process.kill()
    others[0].process.kill()
    for rank, run in enumerate((with_first, with_second)):
        assert run.wait() == 3
        first, *rest = last_words(run)
        place = r"MASTER_ADDR=127.0.0.1 MASTER_PORT=\d+ within parallel.timeout_seconds=2: "
        assert re.match(f"rank {rank}: the 2 ranks did not all meet at {place}", first), run.log
        assert len(rest) == 1, run.log


def test_run_continues_after_the_fault(folder: Path, fail: Callable[[str], Failure]) -> None:
    fail("ring")
    logs = run_ranks(train(folder, "ring", *CASES["ring"].overrides), folder, faults=(None,) * 3)
    assert "continuing from ring/checkpoints/step_00000001" in logs[0]
    assert len(column(folder / "ring", "loss")) == 3
    assert "flight_recorder" not in os.listdir(folder / "ring")


def test_barrier_follows_each_algorithm(folder: Path, fail: Callable[[str], Failure]) -> None:
    fail("ring")
    arguments = train(folder, "sync", "parallel.ring=2", "run.steps=2", "parallel.sync=barrier")
    run_ranks(arguments, folder)
    barriers = json.loads((folder / "sync/comm.json").read_text())["ring"]["barrier"]
    # Forward and backward of 2 steps of 2 micro batches end with one, and 3 forwards of evaluation.
    assert barriers["by_kind"]["full_attention"]["calls"] == 2 * 2 * 2 + 3
    assert barriers["bytes"] == 0
    loss, expected = (column(folder / name, "loss")[0] for name in ("sync", "ring"))
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("sync", "size", "waits"), [("none", 2, 0), ("device", 2, 1), ("device", 1, 0)]
)
def test_device_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, sync: Literal["none", "device"], size: int, waits: int
) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    comm = Comm(Mesh(0, size, 0, torch.device("cuda")), sync=sync)
    comm.settle(Axis("ring", tuple(range(size))))
    assert waited == [torch.device("cuda")] * waits
