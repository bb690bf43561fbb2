"""A run that is killed at any moment and started again is the run that was never killed."""

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.runs import Run, column, read_metrics, run, tiny

STEPS = 30
MOMENTS = ("start", "checkpoint", "step", "evaluation", "checkpoint") * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of all runs here, and the run that nobody disturbed in `reference`."""
    path = tmp_path_factory.mktemp("resume")
    run(train(path, "run.dir=reference"), path)
    return path


def train(folder: Path, *overrides: str) -> list[str]:
    return tiny(
        folder,
        "spike.enabled=true",
        "optim.schedule=constant",
        "checkpoint.every=2",
        "evaluation.every=3",
        f"run.steps={STEPS}",
        *overrides,
    )


def wait_until(condition: Callable[[], bool], started: Run) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert started.process.is_alive(), f"it ended before it was killed:\n{started.log}"
        assert time.monotonic() < deadline, started.log
        time.sleep(0.0005)


def wait_for(started: Run, text: str) -> None:
    wait_until(lambda: text in started.log, started)


def kill(started: Run, run_dir: Path, moment: str, rng: random.Random) -> None:
    """Send SIGKILL somewhere in the middle of `moment`."""
    begun = time.time()

    def own_steps() -> list[int]:
        return [int(step) for step in re.findall(r"^step (\d+)/", started.log, re.MULTILINE)]

    def saving() -> bool:
        try:
            working = (run_dir / "checkpoints").glob(".step_*.tmp")
            return any(path.stat().st_mtime > begun for path in working)
        except FileNotFoundError:  # Completed between the listing and the look at it.
            return False

    if moment == "start":
        time.sleep(rng.uniform(0.05, 1.0))
    elif moment == "step":
        count = rng.randint(1, 2)
        wait_until(lambda: len(own_steps()) >= count, started)
        time.sleep(rng.uniform(0.0, 0.03))
    elif moment == "evaluation":
        wait_until(lambda: any(step % 3 == 0 for step in own_steps()), started)
        time.sleep(rng.uniform(0.0, 0.006))
    else:
        wait_until(saving, started)
        time.sleep(rng.uniform(0.0, 0.005))
    started.process.kill()
    assert started.wait() == -signal.SIGKILL, started.log


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_killed_ten_times_equals_uninterrupted_bit_for_bit(folder: Path, zero_stage: int) -> None:
    stage = f"parallel.zero_stage={zero_stage}"
    whole, run_dir = folder / f"whole-{zero_stage}", folder / f"killed-{zero_stage}"
    run(train(folder, stage, f"run.dir={whole.name}"), folder)
    arguments = train(folder, stage, f"run.dir={run_dir.name}")
    rng, cut_short = random.Random(zero_stage), set()
    for moment in MOMENTS:
        kill(Run(arguments, folder), run_dir, moment, rng)
        if any((run_dir / "checkpoints").glob(".step_*")):
            cut_short.add("checkpoint")
        last = read_metrics(run_dir)[-1:] if (run_dir / "metrics.jsonl").exists() else []
        if any("loss" in record and record["step"] % 3 == 0 for record in last):
            cut_short.add("evaluation")
    run(arguments, folder)

    assert cut_short == {"checkpoint", "evaluation"}, "kills missed what they were aimed at"
    records = read_metrics(run_dir)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if "val_loss" in r] == list(range(3, STEPS + 1, 3))
    assert records == read_metrics(whole)
    assert {"spike_sparsity", "mean_spikes", "grad_norm", "lr", "num_tokens"} < records[0].keys()
    last = f"checkpoints/step_{STEPS:08d}"
    for name in ("manifest.json", "state.json", "shard_00000.safetensors"):
        assert (run_dir / last / name).read_bytes() == (whole / last / name).read_bytes(), name
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_killed_run_without_a_directory_continues_its_own(tmp_path: Path, folder: Path) -> None:
    arguments = train(folder)
    for moment in ("run directory: ", "step 5/"):
        started = Run(arguments, tmp_path)
        wait_for(started, moment)
        started.process.kill()
        started.wait()
    log = run(arguments, tmp_path)
    (run_dir,) = (tmp_path / "runs").glob("train-*")
    assert f"run directory: {run_dir.relative_to(tmp_path)}" in log
    assert read_metrics(run_dir) == read_metrics(folder / "reference")


def test_finished_run_takes_no_step_and_keeps_its_report(folder: Path) -> None:
    run_dir = folder / "reference"
    before = {p.name: p.read_text() for p in run_dir.glob("*.json*")}
    log = run(train(folder, "run.dir=reference"), folder)
    assert "continuing from" in log
    assert "loss" not in log
    assert {p.name: p.read_text() for p in run_dir.glob("*.json*")} == before


def test_more_steps_continue_a_finished_run(folder: Path) -> None:
    run(train(folder, "run.dir=longer", "run.steps=6"), folder)
    run(train(folder, "run.dir=longer", "run.steps=9"), folder)
    assert read_metrics(folder / "longer") == [
        record for record in read_metrics(folder / "reference") if record["step"] <= 9
    ]


def test_damaged_checkpoint_is_named_and_the_one_before_used(folder: Path) -> None:
    run(train(folder, "run.dir=damaged", "run.steps=6"), folder)
    checkpoints = folder / "damaged" / "checkpoints"
    shard = checkpoints / "step_00000006" / "shard_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    log = run(train(folder, "run.dir=damaged", "run.steps=9"), folder)
    assert str(shard.relative_to(folder)) in log
    assert "continuing from damaged/checkpoints/step_00000004" in log
    assert read_metrics(folder / "damaged") == [
        record for record in read_metrics(folder / "reference") if record["step"] <= 9
    ]


def test_only_damaged_checkpoints_end_the_run(folder: Path) -> None:
    run(train(folder, "run.dir=hopeless", "run.steps=2"), folder)
    manifest = folder / "hopeless/checkpoints/step_00000002/manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    log = run(train(folder, "run.dir=hopeless"), folder, expect=3)
    assert "no checkpoint of steps [2]" in log
    assert "Traceback" not in log


def test_resume_names_a_checkpoint_of_another_run(folder: Path) -> None:
    run(train(folder, "run.dir=source", "run.steps=4"), folder)
    checkpoint = "source/checkpoints/step_00000002"
    run(train(folder, "run.dir=branch", f"run.resume={checkpoint}", "run.steps=6"), folder)
    reference = column(folder / "reference", "loss")
    assert column(folder / "branch", "loss") == reference[2:6]


def test_resume_never_starts_afresh_and_overwrites_nothing(folder: Path) -> None:
    arguments = train(folder, "run.resume=never", "run.steps=2")
    run([*arguments, "run.dir=fresh"], folder)
    log = run([*arguments, "run.dir=fresh"], folder, expect=2)
    assert "run.resume=never: run.dir=fresh holds a run already" in log
    assert column(folder / "fresh", "loss") == column(folder / "reference", "loss")[:2]


def test_interrupted_run_says_how_to_continue(folder: Path) -> None:
    started = Run(train(folder, "run.dir=interrupted"), folder)
    wait_for(started, "step 3/")
    assert started.process.pid is not None
    os.kill(started.process.pid, signal.SIGINT)
    assert started.wait() == 130
    assert "interrupted; the same command continues" in started.log
    run(train(folder, "run.dir=interrupted"), folder)
    assert read_metrics(folder / "interrupted") == read_metrics(folder / "reference")
