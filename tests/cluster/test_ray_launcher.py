"""launcher=ray: workers give the losses of one process, and start again when one dies."""

import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers.runs import Run, column, run, tiny

from trainer.checkpoint import CheckpointStore, load_state, load_tensors

pytestmark = pytest.mark.slow
STEPS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of all runs here, and the run of one process in `inline`."""
    path = tmp_path_factory.mktemp("ray")
    run(train(path, "run.dir=inline"), path)
    return path


def train(folder: Path, *overrides: str) -> list[str]:
    return tiny(folder, "checkpoint.every=2", f"run.steps={STEPS}", *overrides)


def workers_of(started: Run) -> list[psutil.Process]:
    processes = psutil.Process(started.process.pid).children(recursive=True)
    return [process for process in processes if "RayTrainWorker" in " ".join(process.cmdline())]


def test_workers_give_the_losses_of_one_process_though_one_is_killed(folder: Path) -> None:
    on_ray = ("launcher=ray", "launcher.num_workers=2", "launcher.max_restarts=1")
    started = Run(train(folder, "run.dir=ray", "parallel.zero_stage=1", *on_ray), folder)
    while not list((folder / "ray").glob("checkpoints/step_*")):
        assert started.process.is_alive(), started.log
        time.sleep(0.01)
    workers = workers_of(started)
    assert len(workers) == 2
    workers[1].kill()

    assert started.wait(timeout=240) == 0, started.log
    for key in ("loss", "grad_norm", "val_loss"):
        expected = column(folder / "inline", key)
        assert column(folder / "ray", key) == pytest.approx(expected, rel=1e-5), key
    assert started.log.count("continuing from ray/checkpoints/step_000000") == 1
    assert started.log.count(f"step {STEPS}/{STEPS}") == 1
    assert started.log.count("report: ray/report.html") == 1


def test_run_that_cannot_go_on_is_not_started_again(folder: Path) -> None:
    source = folder / "inline/checkpoints" / f"step_{STEPS:08d}"
    tensors = load_tensors(source)
    weights = {name: tensors.get(name) for name in tensors}
    weights["model/norm.weight"] = torch.full_like(weights["model/norm.weight"], torch.nan)
    store = CheckpointStore(folder / "poisoned", keep=1)
    store.begin(2)
    store.write_shard(2, 0, weights)
    poisoned = store.commit(2, load_state(source) | {"step": 2})

    settings = ("run.dir=stuck", f"run.resume={poisoned}", "run.max_nonfinite_steps=3")
    on_ray = ("launcher=ray", "launcher.num_workers=2", "launcher.max_restarts=2")
    log = run(train(folder, *settings, *on_ray), folder, expect=3)
    for step in (3, 4, 5):
        assert log.count(f"step {step} skipped: non-finite loss") == 1, log
    assert log.count("3 steps in a row had a loss or gradient that is not finite") == 1, log
    assert "last good checkpoint: stuck/checkpoints/step_00000004" in log
