"""The benchmarks: fair timing, memory that is counted, kernels that cannot ship are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.runs import longaxon

from trainer.bench.kernels import Built, Job
from trainer.bench.memory import peak_allocated_bytes
from trainer.bench.rows import Row, median_seconds


def test_sides_are_timed_in_turn_after_a_warm_up() -> None:
    calls: list[str] = []
    sides = [lambda: calls.append("a"), lambda: calls.append("b")]
    seconds = median_seconds(sides, 3, lambda: calls.append("wait"))
    assert [c for c in calls if c != "wait"] == ["a", "b"] * 4
    assert calls[2:5] == ["wait", "a", "wait"]
    assert len(seconds) == 2
    assert all(s >= 0 for s in seconds)


def test_peak_memory_is_what_is_alive_at_once() -> None:
    def compute() -> None:
        first, second = torch.empty(1 << 20), torch.empty(3 << 20)
        del first, second
        torch.empty(2 << 20)

    assert peak_allocated_bytes(compute, torch.device("cpu")) == 4 * (4 << 20)


@pytest.mark.parametrize(
    ("figures", "error", "problem"),
    [
        ({"spilled_bytes": 0, "shared_bytes": 65536}, None, None),
        ({"spilled_bytes": 8, "shared_bytes": 0}, None, "spills 8 bytes"),
        ({"spilled_bytes": 0, "shared_bytes": 65537}, None, "needs 65537 bytes of shared memory"),
        ({}, "ValueError: no", "ValueError: no"),
    ],
)
def test_kernels_that_cannot_ship_have_a_problem(
    figures: dict[str, int], error: str | None, problem: str | None
) -> None:
    built = Built(Job("attention", "gfx942", 0), "_kernel", "bf16", figures, 65536, error)
    assert (built.problem or "").startswith(problem or "")
    assert (built.problem is None) == (problem is None)


def test_a_row_prints_its_peer_and_none() -> None:
    assert "(SDPA)" in str(Row("case", "seconds", 1.0, "s", "SDPA", 2.0, 2.0))
    assert "(none)" in str(Row("case", "seconds", 1.0, "s"))


def test_suite_ops_begins_with_what_was_chosen(tmp_path: Path) -> None:
    result = longaxon(["bench", "suite=ops", "operators=[swiglu]", "out=rows.json"], tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    chosen = [line for line in lines if line.startswith("ops.")]
    assert lines.index(chosen[0]) < next(i for i, line in enumerate(lines) if "ratio" in line)
    assert any(line.startswith("ops.attention ") for line in chosen)
    context, *rows = json.loads((tmp_path / "rows.json").read_text())
    assert {"device", "num_threads", "dtype", "versions", "measured_peak_flops"} <= context.keys()
    assert [row["case"] for row in rows] == ["swiglu 2048x18944"]
    fields = {"case", "metric", "value", "unit", "peer", "peer_value", "ratio"}
    assert rows[0].keys() == fields
    assert rows[0]["ratio"] == pytest.approx(rows[0]["peer_value"] / rows[0]["value"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("operators=[nothing]", "operators=['nothing']: no such operator; there are attention"),
        ("cases='('", "cases='(': no regular expression"),
        ("archs=[sm_1]", "sm_1"),
        ("accelerator=cuda", "PyTorch sees no CUDA device; use accelerator=cpu"),
    ],
)
def test_what_cannot_be_measured_is_refused(override: str, message: str, tmp_path: Path) -> None:
    if torch.cuda.is_available() and "cuda" in override:
        pytest.skip("there is a CUDA device")
    result = longaxon(["bench", "suite=ops", override], tmp_path)
    assert result.returncode == 2
    assert message in result.stderr


def build_kernels(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command without the interpreter, which kernels are imported with in the tests."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(sys.executable).with_name("longaxon")
    return subprocess.run(
        [program, "bench", *overrides], cwd=folder, env=env, capture_output=True, text=True
    )
