"""Two ranks compute what one does, at every ZeRO stage, and either continues the other's run."""

import time
from pathlib import Path

import pytest
from helpers.runs import Faults, column, run, run_ranks, start_ranks, tiny

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of all runs here, and the run of one rank in `one`."""
    path = tmp_path_factory.mktemp("ranks")
    run(train(path, "one"), path)
    return path


def train(folder: Path, name: str, *overrides: str) -> list[str]:
    every = ("checkpoint.every=2", "evaluation.every=2", "optim.schedule=constant")
    return tiny(folder, *every, f"run.steps={STEPS}", f"run.dir={name}", *overrides)


def assert_equals_one_rank(folder: Path, name: str) -> None:
    for key in ("loss", "grad_norm", "lr", "num_tokens", "val_loss", "val_bits_per_byte"):
        expected = column(folder / "one", key)
        assert len(expected) in (STEPS, STEPS // 2)
        assert column(folder / name, key) == pytest.approx(expected, rel=1e-5), key


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_equal_one(folder: Path, zero_stage: int) -> None:
    name = f"two-{zero_stage}"
    logs = run_ranks(train(folder, name, f"parallel.zero_stage={zero_stage}"), folder)
    assert_equals_one_rank(folder, name)
    assert f"step {STEPS}/{STEPS}" in logs[0]
    assert logs[1] == "", "only the first rank speaks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "stations",
    [((2, 0), (1, 1), (2, 2), (1, 3)), ((2, 3), (1, 2), (2, 1), (1, 0))],
    ids=lambda stations: "-".join(f"{ranks}x-zero{stage}" for ranks, stage in stations),
)
def test_run_moves_between_ranks_and_stages(
    folder: Path, stations: tuple[tuple[int, int], ...]
) -> None:
    name = f"moves-from-{stations[0][1]}"
    for steps, (ranks, stage) in zip((2, 4, 6, 8), stations, strict=True):
        station = (f"run.steps={steps}", f"parallel.zero_stage={stage}")
        run_ranks(train(folder, name, *station), folder, faults=(None,) * ranks)
        assert len(column(folder / name, "loss")) == steps
    assert_equals_one_rank(folder, name)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_one_ranks_bad_loss_skips_the_step_on_all(folder: Path, zero_stage: int) -> None:
    arguments = train(folder, f"bad-{zero_stage}", f"parallel.zero_stage={zero_stage}")
    logs = run_ranks(arguments, folder, faults=(None, Faults("loss", steps=(3,))))
    assert "step 3 skipped: non-finite loss" in logs[0]
    losses = column(folder / f"bad-{zero_stage}", "loss")
    assert [step for step, loss in enumerate(losses, 1) if loss is None] == [3]
    assert losses[-1] < losses[0]


def test_one_ranks_full_disk_ends_all(folder: Path) -> None:
    faults = (None, Faults(max_file_bytes=100_000))
    logs = run_ranks(train(folder, "full"), folder, faults=faults, expect=3)
    assert all("could not be written" in log and "Traceback" not in log for log in logs)
    assert not list((folder / "full/checkpoints").iterdir())


def test_killed_rank_ends_the_other_and_the_run_continues(folder: Path) -> None:
    arguments = train(folder, "killed", "parallel.zero_stage=2")
    first, second = start_ranks(arguments, folder, (None, None))
    while "checkpoint: " not in first.log:
        assert second.process.is_alive(), second.log
        time.sleep(0.01)
    second.process.kill()
    assert first.wait() == 3
    assert "last complete checkpoint: killed/checkpoints/step_0000000" in first.log
    run_ranks(arguments, folder)
    assert_equals_one_rank(folder, "killed")
