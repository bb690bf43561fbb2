"""A pipeline trains as one rank does, tells what it costs, skips a bad step, and can be killed."""

import re
from pathlib import Path

import pytest
import torch
from helpers.assertions import assert_close
from helpers.runs import Faults, Run, column, read_metrics, run, run_ranks, start_ranks, tiny

from trainer.checkpoint import load_tensors

MODEL = ("model.num_layers=4", "data.micro_batch_size=1", "evaluation.every=2")


def train(folder: Path, name: str, *overrides: str) -> list[str]:
    every = ("checkpoint.every=2", "optim.schedule=constant", "spike.enabled=true")
    return tiny(folder, *MODEL, *every, f"run.dir={name}", *overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of all runs here, and the run of one rank in `one`."""
    path = tmp_path_factory.mktemp("pipeline")
    run(train(path, "one"), path)
    return path


@pytest.mark.parametrize(
    ("num_ranks", "overrides", "told"),
    [
        (4, ("parallel.pp=4", "data.global_batch_size=4"), "stages of 1+1+1+1 layers, 4 micro"),
        (4, ("parallel.pp=2", "parallel.zero_stage=1"), "stages of 2+2 layers, 2 micro batches;"),
        (3, ("parallel.pp=3",), "4 micro batches; a stage waits 33% of a step"),
    ],
    ids=["pp4", "pp2-dp2-zero1", "pp3"],
)
def test_stages_equal_one_rank(
    folder: Path, num_ranks: int, overrides: tuple[str, ...], told: str
) -> None:
    name = f"pp-{num_ranks}"
    logs = run_ranks(train(folder, name, *overrides), folder, faults=(None,) * num_ranks)
    assert told in logs[0]
    assert logs[1:] == [""] * (num_ranks - 1), "only the first rank speaks"
    for key in ("loss", "grad_norm", "lr", "num_tokens", "val_loss", "val_bits_per_byte"):
        expected = column(folder / "one", key)
        assert expected
        assert column(folder / name, key) == pytest.approx(expected, rel=1e-5), key
    keys = [record.keys() for record in read_metrics(folder / "one")]
    assert [record.keys() for record in read_metrics(folder / name)] == keys
    checkpoint = "checkpoints/step_00000002"
    tensors, wanted = (load_tensors(folder / n / checkpoint) for n in (name, "one"))
    assert sorted(tensors) == sorted(wanted)
    for key in wanted:
        if key.startswith("exp_avg/"):
            assert_close(key, tensors.get(key), wanted.get(key), torch.float32)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_one_ranks_bad_loss_skips_the_step_in_all_stages(folder: Path, zero_stage: int) -> None:
    bad, steps = Faults("loss", steps=(3,)), ("run.steps=5", "evaluation.every=9")
    if not (folder / "bad-one").exists():
        run(train(folder, "bad-one", *steps), folder, faults=bad)
    name = f"bad-{zero_stage}"
    arguments = train(folder, name, *steps, "parallel.pp=2", f"parallel.zero_stage={zero_stage}")
    logs = run_ranks(arguments, folder, faults=(None, None, None, bad))
    assert "step 3 skipped: non-finite loss" in logs[0]
    losses, expected = (column(folder / n, "loss") for n in (name, "bad-one"))
    assert losses[2] is expected[2] is None
    assert losses[:2] + losses[3:] == pytest.approx(expected[:2] + expected[3:], rel=1e-5)


EXPERTS = (
    "+moe@model.ffns.moe.moe=top1_shared", "model.ffns.moe.moe.num_experts=2",
    "+model.ffns.moe.intermediate_size=16", "model.num_layers=2",
    "model.layers=[{mixers:[linear],ffn:dense},{mixers:[window],ffn:moe}]",
)  # fmt: skip


def check_last_words(survivors: list[Run], told: list[str], run_dir: str) -> None:
    """Every survivor says where it was, and that the last rank is to blame."""
    gone = r"failed: a rank it talks to is gone, its connection is closed"
    for rank, survivor in enumerate(survivors):
        assert survivor.wait() == 3, survivor.log
        words = f"^rank {rank}: in step 2, {told[rank]} {gone}$"
        assert re.search(words, survivor.log, re.MULTILINE), survivor.log
        culprit = len(survivors)
        assert f"most likely at fault: rank {culprit}, whose process is gone" in survivor.log
        assert f"last complete checkpoint: {run_dir}/checkpoints/step_00000001" in survivor.log
        assert "Traceback" not in survivor.log, survivor.log


def test_rank_killed_in_a_dispatch_ends_all_stages(folder: Path) -> None:
    layout = ("parallel.pp=2", "parallel.ep=2", "parallel.timeout_seconds=20", "checkpoint.every=1")
    arguments = train(folder, "killed", *EXPERTS, *layout)
    fault = Faults(halt=("SIGKILL", "dispatch of layers.1", 2))
    *survivors, _ = start_ranks(arguments, folder, (None, None, None, fault))
    first = r"pipeline, stage 1 of 2 \(DeepSpeed, ZeRO 0\)"
    # It may have sent what it was killed over.
    mate = r"(counts|dispatch|combine) of layers.1 \(moe\) on axis ep"
    check_last_words(survivors, [first, first, mate], "killed")


def test_killed_stage_ends_the_others(folder: Path) -> None:
    layout = ("parallel.pp=3", "parallel.zero_stage=1", "parallel.timeout_seconds=20")
    arguments = train(folder, "cut", "checkpoint.every=1", *layout)
    fault = Faults(halt=("SIGKILL", "pipeline", 2))
    *survivors, _ = start_ranks(arguments, folder, (None, None, fault))
    told = [rf"pipeline, stage {stage} of 3 \(DeepSpeed, ZeRO 1\)" for stage in (1, 2)]
    check_last_words(survivors, told, "cut")
