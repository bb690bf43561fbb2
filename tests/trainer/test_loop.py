"""The training loop: it learns, the same under every setting, and survives what goes wrong."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.runs import Faults, column, read_metrics, run, tiny

from trainer.checkpoint import load_state, load_tensors

STEPS = 6
STEP_KEYS = {
    "step", "loss", "grad_norm", "lr", "num_tokens", "step_seconds", "tokens_per_second", "mfu",
    "hfu", "peak_memory_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of all runs here, and a plain run of six steps in `plain`."""
    path = tmp_path_factory.mktemp("loop")
    run(train(path, "run.dir=plain"), path)
    return path


def train(folder: Path, *overrides: str) -> list[str]:
    return tiny(
        folder, f"run.steps={STEPS}", "checkpoint.every=2", "evaluation.every=3", *overrides
    )


def assert_same_numbers(folder: Path, name: str) -> None:
    """Check loss, gradient norm and validation loss of every step against the plain run's."""
    for key in ("loss", "grad_norm", "val_loss"):
        expected = column(folder / "plain", key)
        assert expected
        assert column(folder / name, key) == pytest.approx(expected, rel=1e-5), key


def test_run_directory_holds_what_is_promised(folder: Path) -> None:
    run_dir = folder / "plain"
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.yaml", "metrics.jsonl", "comm.json", "profile.json", "report.json", "report.html",
        "checkpoints", "finished",
    }  # fmt: skip
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert all(record.keys() == STEP_KEYS for record in steps)
    assert [record["num_tokens"] for record in steps] == [128 * n for n in range(1, STEPS + 1)]
    evaluations = [record for record in records if "val_loss" in record]
    assert [record["step"] for record in evaluations] == [3, 6]
    assert evaluations[0].keys() == {"step", "val_loss", "val_bits_per_byte"}
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == [
        f"step_{step:08d}" for step in (2, 4, 6)
    ]
    page = (run_dir / "report.html").read_text()
    assert set(re.findall(r"https?://[\w.]+", page)) <= {"http://www.w3.org"}


def test_spiking_run_records_its_spikes(folder: Path) -> None:
    run(train(folder, "run.dir=spiking", "spike.enabled=true", "run.steps=2"), folder)
    for record in read_metrics(folder / "spiking")[:2]:
        assert 0 < record["spike_sparsity"] < 1
        assert record["spike_sparsity"] == pytest.approx(1 - record["mean_spikes"] / 3)
        assert record["spike_sparsity"] <= record["spike_sparsity_within_7"] < 1
        assert 0 < record["spike_share_silent"] < record["spike_share_within_7"] <= 1
        assert record["spike_share_above_16"] < 0.1
    evaluations = [r for r in read_metrics(folder / "spiking") if "val_loss" in r]
    spikes = json.loads((folder / "spiking" / "report.json").read_text())["spikes"]
    validation = spikes["validation"]
    assert evaluations[-1]["val_mean_spikes"] == validation["model"]["mean_spikes"]
    assert [e["name"] for e in validation["layers"]] == [e["name"] for e in spikes["layers"]]
    assert len(spikes["sample"]["counts"]) == 48
    page = (folder / "spiking" / "report.html").read_text()
    assert all(text in page for text in ("last validation", "Spikes over time", "twos complement"))


def test_tiny_run_learns(folder: Path) -> None:
    run(train(folder, "run.dir=learns", "run.steps=60", "optim.lr=0.01"), folder)
    loss = column(folder / "learns", "loss")
    assert loss[0] == pytest.approx(5.58, abs=0.1)  # as good as a guess among 264 tokens
    assert sum(loss[-5:]) / 5 < 3
    assert column(folder / "learns", "val_loss")[-1] < 3


def test_config_of_a_run_repeats_it(folder: Path) -> None:
    again = ["train", "--config-dir", "plain", "--config-name", "config", "run.dir=again"]
    run(again, folder)
    assert read_metrics(folder / "again") == read_metrics(folder / "plain")


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.micro_batch_size=4"],
        ["data.micro_batch_size=1"],
        ["parallel.zero_stage=1"],
        ["parallel.zero_stage=2"],
        ["parallel.zero_stage=3"],
        ["parallel.zero_stage=1", "parallel.offload=optimizer"],
        ["parallel.zero_stage=3", "parallel.offload=optimizer"],
        ["parallel.zero_stage=3", "parallel.offload=all"],
        ["parallel.recompute=selective"],
        ["parallel.recompute=full"],
        ["parallel.recompute=full", "parallel.zero_stage=3"],
        [
            "ops.linear_attention=reference",
            "ops.attention=reference",
            "ops.cross_entropy=reference",
        ],
    ],
    ids=lambda overrides: "-".join(o.partition(".")[2] for o in overrides),
)
def test_numbers_do_not_depend_on(folder: Path, overrides: list[str]) -> None:
    name = "-".join(overrides)
    run(train(folder, f"run.dir='{name}'", *overrides), folder)
    assert_same_numbers(folder, name)


@pytest.mark.parametrize("poisoned", ["loss", "gradient"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_step_that_is_not_finite_changes_nothing(
    folder: Path, zero_stage: int, poisoned: str
) -> None:
    name = f"skips-{zero_stage}-{poisoned}"
    settings = (f"run.dir={name}", f"parallel.zero_stage={zero_stage}")
    settings += ("checkpoint.every=1", "checkpoint.keep=9", "run.steps=5")
    log = run(train(folder, *settings), folder, faults=Faults(poisoned, steps=(3,)))
    assert f"step 3 skipped: non-finite {poisoned}" in log

    steps = [record for record in read_metrics(folder / name) if "val_loss" not in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    skipped = steps.pop(2)
    assert (skipped["loss"], skipped["grad_norm"], skipped["skipped"]) == (None, None, True)
    assert skipped["reason"] == f"non-finite {poisoned}"
    assert not any("skipped" in record for record in steps)
    assert all(record["loss"] < 6 for record in steps)

    before, after = (folder / name / f"checkpoints/step_0000000{step}" for step in (2, 3))
    assert load_state(after)["optimizer_steps"] == load_state(before)["optimizer_steps"] == 2
    assert load_state(after)["consumed"] == load_state(before)["consumed"] + 4
    tensors = load_tensors(before)
    assert len(list(tensors)) > 100
    assert all(torch.equal(tensors.get(key), load_tensors(after).get(key)) for key in tensors)
    report = json.loads((folder / name / "report.json").read_text())
    assert [entry["step"] for entry in report["skipped_steps"]] == [3]


def test_too_many_such_steps_end_the_run(folder: Path) -> None:
    arguments = train(folder, "run.dir=hopeless", "run.max_nonfinite_steps=2")
    log = run(arguments, folder, expect=3, faults=Faults("loss", steps=(2, 4, 5)))
    assert "2 steps in a row had a loss or gradient that is not finite" in log
    assert "last good checkpoint: hopeless/checkpoints/step_00000004" in log
    assert "Traceback" not in log
    # The fault gone, the same command goes on from there.
    assert "continuing from hopeless/checkpoints/step_00000004" in run(arguments, folder)


def test_full_disk_ends_the_run_and_spares_the_checkpoint_before(folder: Path) -> None:
    run(train(folder, "run.dir=full", "run.steps=2"), folder)
    arguments = train(folder, "run.dir=full")
    log = run(arguments, folder, expect=3, faults=Faults(max_file_bytes=100_000))
    assert "could not be written" in log
    assert "the newest is full/checkpoints/step_00000002" in log
    assert "Traceback" not in log
    assert [path.name for path in (folder / "full/checkpoints").iterdir()] == ["step_00000002"]
    run(arguments, folder)
    assert column(folder / "full", "loss") == column(folder / "plain", "loss")
