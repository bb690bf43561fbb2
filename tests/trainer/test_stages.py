"""A chain of stages, from a pretrained model to answers: each a run that begins with the last."""

import json
import time
from pathlib import Path

import pytest
import torch
from helpers.runs import Faults, Run, column, read_metrics, run, run_ranks, tiny
from helpers.smollm2 import require_smollm2

from cluster.cli import run as run_here
from trainer.checkpoint import load_state, load_tensors
from trainer.communication import communication_table

BASE = "model.layers=[{mixers:[window],ffn:dense}]"
HYBRID = "model.layers=[{mixers:[linear],ffn:dense},{mixers:[window],ffn:dense}]"
STAGES = (
    "+stages.convert={convert:{router_std:0.001}}",
    "+stages.transfer={objective:{kind:attention_transfer,teacher:base},run:{steps:3}}",
    "+stages.distill={objective:{kind:distillation,teacher:base,temperature:2.0},run:{steps:3}}",
    "+stages.sft={data:{source:chat,path:chats.jsonl,chat_template:chatml,packing:domain,"
    "too_long:truncate,seq_len:96},adapters:{rank:2,alpha:4.0,targets:[mixer]},run:{steps:2}}",
    "+stages.long={data:{seq_len:64,global_batch_size:2,micro_batch_size:1},optim:{lr:0.001},"
    "objective:{train:'[.]mixer[.]'},run:{steps:2}}",
)


def chain(folder: Path, *overrides: str) -> list[str]:
    settings = ("run.init_from=base", "optim.lr=0.01", "checkpoint.every=1", "checkpoint.keep=9")
    return tiny(folder, HYBRID, *settings, *STAGES, *overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in `base`, and a chain that went through in `chain`."""
    path = tmp_path_factory.mktemp("stages")
    answers = [
        {"messages": [
            {"role": "user", "content": f"spike {i}?"},
            {"role": "assistant", "content": f"axon {i}"},
        ]} for i in range(60)
    ]  # fmt: skip
    (path / "chats.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    run(tiny(path, BASE, "run.dir=base", "optim.lr=0.01"), path)
    (path / "log").write_text(run(chain(path, "run.dir=chain"), path))
    return path


def weights(folder: Path, run_dir: str, step: int) -> dict[str, torch.Tensor]:
    tensors = load_tensors(folder / f"chain/{run_dir}/checkpoints/step_{step:08d}")
    return {name: tensors.get(name) for name in tensors}


def test_every_stage_is_a_run_and_stands_in_the_summary(folder: Path) -> None:
    rows = json.loads((folder / "chain/stages.json").read_text())
    assert [(row["folder"], row["does"], row["seq_len"], row["steps"]) for row in rows] == [
        ("01-convert", "convert", None, None),
        ("02-transfer", "attention_transfer", 32, 3),
        ("03-distill", "distillation", 32, 3),
        ("04-sft", "next_token", 96, 2),
        ("05-long", "next_token", 64, 2),
    ]
    for row in rows[1:]:
        run_dir = folder / "chain" / row["folder"]
        assert (run_dir / "report.json").exists()
        assert row["num_tokens"] == column(run_dir, "num_tokens")[-1]
        assert row["loss"] == column(run_dir, "loss")[-1]
        assert row["val_loss"] == column(run_dir, "val_loss")[-1]
    log = (folder / "log").read_text()
    assert "stage 3 of 5, distill: chain/03-distill" in log
    assert "05-long" in log.splitlines()[-1]


def test_stage_begins_with_the_weights_alone_of_the_one_before(folder: Path) -> None:
    for before, after, step in (("01-convert", "02-transfer", 0), ("02-transfer", "03-distill", 3)):
        state = load_state(folder / f"chain/{after}/checkpoints/step_00000001")
        assert (state["step"], state["consumed"], state["optimizer_steps"]) == (1, 4, 1)
        old, new = weights(folder, before, step), weights(folder, after, 1)
        for name in (name for name in old if name.startswith("model/")):
            assert (old[name] - new[name]).abs().max() < 0.011  # one step of at most this lr
    # What the first stages learn is the next one's first loss.
    cross_entropy = column(folder / "chain/03-distill", "cross_entropy")
    assert cross_entropy[0] > cross_entropy[-1]


@pytest.mark.parametrize(
    ("stage", "step", "trained"),
    [
        ("02-transfer", 3, ("layers.0.mixer.", "layers.2.mixer.")),
        ("04-sft", 2, (".adapter.a", ".adapter.b")),
        ("05-long", 2, (".mixer.",)),
    ],
)
def test_only_what_is_to_be_trained_changes(
    folder: Path, stage: str, step: int, trained: tuple[str, ...]
) -> None:
    first, last = weights(folder, stage, 1), weights(folder, stage, step)
    moments = {name.removeprefix("exp_avg/") for name in last if name.startswith("exp_avg/")}
    names = {name.removeprefix("model/") for name in last if name.startswith("model/")}
    assert moments == {name for name in names if any(part in name for part in trained)}
    for name in names:
        is_same = torch.equal(first[f"model/{name}"], last[f"model/{name}"])
        assert is_same == (name not in moments), name


def test_killed_chain_goes_on_to_the_same_numbers(folder: Path) -> None:
    arguments = chain(folder, "run.dir=cut")
    started = Run(arguments, folder)
    deadline = time.monotonic() + 60
    while not (folder / "cut/02-transfer/checkpoints/step_00000001").exists():
        assert started.process.is_alive(), started.log
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.process.kill()
    started.process.join()
    # Then it fails for good in the last stage, which finds one bad step too many.
    log = run(
        [*arguments, "run.max_nonfinite_steps=1"], folder, expect=3, faults=Faults(steps=(2,))
    )
    assert "stage 1 of 5, convert: done before" in log
    assert "continuing from cut/02-transfer/checkpoints/step_0000000" in log
    assert "failed; the same command continues with it" in log
    run([*arguments, "run.max_nonfinite_steps=1"], folder)
    for stage in ("02-transfer", "03-distill", "04-sft", "05-long"):
        assert read_metrics(folder / "cut" / stage) == read_metrics(folder / "chain" / stage)


def test_chain_that_is_done_or_wrong_starts_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    arguments = chain(folder, "run.dir=chain")
    before = {path: path.stat().st_mtime_ns for path in (folder / "chain").rglob("*.safetensors")}
    assert run_here(arguments) == 0
    for key, value, message in (
        ("long.run.steps", 3, "stages.long: run.steps=3: the stage is done, with 2"),
        ("transfer.run.seed", 1, "stages.transfer: run.seed=1: the run in chain/02-transfer"),
        ("long.parallel", "{pp:2}", "stages.long: parallel.pp=2 x parallel.ulysses=1"),
        ("long.optim.lrr", 1, "stages.long: optim.lrr: no such key"),
        ("distill.objective.teacher", "nobody", "stages.distill: nobody holds no checkpoint"),
    ):
        assert run_here([*arguments, f"++stages.{key}={value}"]) == 2
        assert message in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in (folder / "chain").rglob("*.safetensors")}
    assert before == after


def test_chain_goes_on_with_the_tokenizer_of_an_imported_model(tmp_path: Path) -> None:
    arguments = tiny(
        tmp_path, BASE, f"data.tokenizer={require_smollm2()}", "model.vocab_size=49152",
        "run.dir=chain", "+stages.first={run:{steps:2}}",
    )  # fmt: skip
    run(arguments, tmp_path)
    assert "stage 1 of 1, first: done before" in run(arguments, tmp_path)


def test_two_ranks_in_other_layouts_learn_the_same_and_send_what_is_predicted(folder: Path) -> None:
    layouts = {
        "02-transfer": "{ring:2,zero_stage:1}",
        "03-distill": "{ulysses:2,recompute:full}",
        "04-sft": "{zero_stage:2}",
        "05-long": "{ring:2,layout:zigzag,linear:scan,zero_stage:1}",
    }
    overrides = [f"++stages.{k.partition('-')[2]}.parallel={v}" for k, v in layouts.items()]
    run_ranks(chain(folder, "run.dir=two", *overrides), folder)
    for stage in layouts:
        expected = read_metrics(folder / "chain" / stage)
        for record, wanted in zip(read_metrics(folder / "two" / stage), expected, strict=True):
            assert record == pytest.approx(wanted, rel=1e-5, abs=1e-7)
        comm = json.loads((folder / "two" / stage / "comm.json").read_text())
        rows = communication_table(comm, 1.0) or []
        assert [row for row in rows if row["as_predicted"] is False] == []
        axes = {row["axis"] for row in rows if row["as_predicted"]}
        assert axes >= ({"dp"} if stage == "04-sft" else {"dp", "sp"})
