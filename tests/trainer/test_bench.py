"""The benchmarks: fair timing, memory that is counted, kernels that cannot ship are refused."""

import importlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import longaxon

import ops.triton_runtime
from cluster import cli
from cluster.accelerators.cpu import ACCELERATOR
from ops.catalog import OPERATORS
from ops.triton_runtime import find_blocks
from trainer.bench import tune
from trainer.bench.kernels import UNITS, Built, Job
from trainer.bench.memory import peak_allocated_bytes
from trainer.bench.rows import Row, median_seconds
from trainer.bench.tune_cases import CASES, build_case, find_case


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
def test_what_cannot_be_measured_is_refused(
    override: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.is_available() and "cuda" in override:
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert cli.run(["bench", "suite=ops", override]) == 2
    assert message in capsys.readouterr().err


LARGEST = (
    r"bf16(-(D128(-vector)?(-reverse)?|into-bf16-D128|grad|E4096|E32768-residual|K4-full|dgrad"
    r"|G1024-plain|weighted|bitwise))?$|documents$|rows128$|unary$"
)
"""One of the largest builds of every kernel; `make kernels` builds all of them."""


@pytest.mark.slow
def test_every_kernel_fits_gpus_that_are_not_here(tmp_path: Path) -> None:
    arguments = ["suite=compile", "archs=[sm_90,gfx942]", f"cases='{LARGEST}'", "out=rows.json"]
    result = longaxon(["bench", *arguments], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    _, *rows = json.loads((tmp_path / "rows.json").read_text())
    found = {tuple(row["case"].split()[:2]) for row in rows}
    kernels = {b.kernel.__name__ for op in OPERATORS for b in triton_impl(op).list_builds("sm_90")}
    assert found == set(itertools.product(("sm_90", "gfx942"), kernels))
    assert {row["metric"] for row in rows} == set(UNITS)
    for row in rows:
        assert row["value"] > 0 or row["metric"] in ("spilled_bytes", "shared_bytes"), row
        assert row["value"] == 0 or row["metric"] != "spilled_bytes", row


def test_rotary_is_built_for_every_architecture(tmp_path: Path) -> None:
    arguments = ["suite=compile", "operators=[rotary]", "cases=bf16-D64", "out=rows.json"]
    result = longaxon(["bench", *arguments], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    _, *rows = json.loads((tmp_path / "rows.json").read_text())
    archs = {"sm_80", "sm_90", "sm_100", "gfx90a", "gfx942"}
    assert {row["case"].split()[0] for row in rows} == archs


def test_search_without_the_gpu_says_what_fits(tmp_path: Path) -> None:
    arguments = ["suite=tune", "operators=[swiglu]", "archs=[sm_90]", "out=rows.json"]
    result = longaxon(["bench", *arguments], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "no GPU here: nothing was timed" in result.stdout
    _, *rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["metric"] for row in rows} == {"candidates_that_fit"}


def test_the_fastest_candidate_is_written_to_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "op.yaml"
    file.write_text("# What it is.\nfwd: {default: {64: {BLOCK: 1, num_warps: 4}}}\n")
    monkeypatch.setattr(tune, "settings_file", lambda op: file)
    search = tune.Search("op", "sm_90", "fwd", 64, ({"BLOCK": 2, "num_warps": 8},))
    tune.write_row(search, search.candidates[0])
    assert file.read_text() == (
        "# What it is.\nfwd:\n  default:\n    64: {BLOCK: 1, num_warps: 4}\n"
        "  sm_90:\n    64: {BLOCK: 2, num_warps: 8}\n"
    )


def test_candidates_are_timed_in_their_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"fwd": {"default": {64: {"BLOCK": 1}}}}
    monkeypatch.setattr(ops.triton_runtime, "_read_settings", lambda op: rows)
    search = tune.Search("op", "sm_90", "fwd", 64, ())
    slow, fast = {"BLOCK": 1}, {"BLOCK": 2}

    def compute() -> None:
        block = find_blocks("op", "fwd", 64, "sm_90")["BLOCK"]
        time.sleep(0.02 if block == 1 else 0.001)

    best, seconds = tune.fastest(search, [slow, fast], compute, 5, ACCELERATOR)
    assert best == fast
    assert 0.001 <= seconds < 0.02


def triton_impl(op: str) -> Any:
    return importlib.import_module(f"ops.{op}.triton_impl")


SEARCHES = [
    (op, kernel)
    for op in OPERATORS
    for kernel in triton_impl(op).SEARCH
    if not kernel.endswith("_fp32")
]


def test_every_kernel_that_is_tuned_has_its_case() -> None:
    served = {find_case(op, kernel): kernel for op, kernel in SEARCHES}
    assert set(served) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_every_case_runs(name: str) -> None:
    op, _, kernel = name.partition(".")
    build_case(op, kernel, 32, 4, torch.float32, torch.device("cpu"))()
