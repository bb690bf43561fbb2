"""longaxon convert: a dense run becomes experts, which evaluate and train on several ranks."""

import math
from pathlib import Path

import pytest
import torch
from helpers.models import compose_tree
from helpers.runs import Faults, column, run, run_ranks, tiny

from cluster.cli import run as run_here
from conf.schema import ConvertConfig, build
from trainer.checkpoint import load_tensors, verify
from trainer.convert import convert_run
from trainer.evaluation.validation import ValidationSuite
from trainer.restore import restore_model

SINKS = "model.num_sinks=2"
EXPERTS = (
    "+moe@model.ffns.experts.moe=top1_shared",
    "model.ffns.experts.moe.num_experts=4",
    "+model.ffns.experts.intermediate_size=48",
    "model.layers=[{mixers:[linear],ffn:dense},{mixers:[window],ffn:experts},"
    "{mixers:[linear,window],ffn:experts}]",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    run(tiny(folder, f"run.dir={folder / 'dense'}", SINKS, "run.steps=8", "optim.lr=1e-2"), folder)
    return folder / "dense"


@pytest.fixture
def to_experts(dense: Path) -> list[str]:
    """Arguments of the conversion, but for `out`."""
    shape = [override for override in tiny(dense.parent) if override.startswith("model.")]
    return [f"run={dense}", "model=tiny", SINKS, *shape, *EXPERTS]


def val_loss(run_dir: Path) -> float:
    suite = ValidationSuite(max_sequences=5)
    return suite.evaluate(restore_model(str(run_dir), CPU)).rows[0]["val_loss"]


def test_experts_of_a_dense_run_evaluate_and_train(dense, to_experts, tmp_path, capsys):
    out, new = tmp_path / "experts", tmp_path / "new"
    assert run_here(["convert", *to_experts, f"out={out}"]) == 0
    checkpoint = out / "checkpoints" / "step_00000000"
    assert capsys.readouterr().out == f"{checkpoint}\n"
    before, after = val_loss(dense), val_loss(out)
    assert before < math.log(256) - 0.5
    assert after == pytest.approx(before, abs=1e-3)
    assert run_here(["generate", f"run={out}", "max_new_tokens=3", "stop_at_end=false"]) == 0

    # With a learning rate of next to nothing, so that the loss tells whose weights these are.
    arguments = tiny(dense.parent, SINKS, *EXPERTS, f"run.dir={new}", f"run.resume={out}")
    steps = ["run.steps=2", "optim.lr=1e-9", "parallel.ep=2"]
    logs = run_ranks([*arguments, *steps], tmp_path)
    assert f"continuing from {checkpoint}" in logs[0]
    assert column(new, "step")[:2] == [1, 2]
    assert column(new, "val_loss")[-1] == pytest.approx(after, abs=1e-5)


def test_config_of_the_experts_starts_a_run_from_them(to_experts, tmp_path):
    out, new = tmp_path / "experts", tmp_path / "new"
    assert run_here(["convert", *to_experts, f"out={out}"]) == 0
    config = ["train", "--config-dir", str(out), "--config-name", "config"]
    log = run([*config, f"run.dir={new}", "run.steps=2", "optim.lr=1e-9"], tmp_path)
    assert f"continuing from {out}" in log
    assert column(new, "val_loss")[-1] == pytest.approx(val_loss(out), abs=1e-5)


def test_tensors_do_not_depend_on_how_they_are_packed(to_experts, tmp_path):
    (tmp_path / "small").mkdir()
    found = []
    for name, max_shard_bytes in [("large", 10**9), ("small", 20_000)]:
        overrides = [*to_experts, f"out={tmp_path / name}"]
        config = build(ConvertConfig, compose_tree(*overrides, config_name="convert"))
        checkpoint = convert_run(config, max_shard_bytes=max_shard_bytes)
        verify(checkpoint)
        found.append(load_tensors(checkpoint))
    large, small = found
    shards = sorted(checkpoint.glob("*.safetensors"))
    assert len(shards) > 5
    # All but that of the embedding, which is larger by itself.
    assert sum(path.stat().st_size > 20_000 + 4_096 for path in shards) == 1
    assert set(large) == set(small)
    assert all(torch.equal(large.get(name), small.get(name)) for name in large)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.ffns.experts.intermediate_size=24", "layers.1.ffn.experts.gate_proj would be"),
        ("model.num_sinks=0", "unexpected: sinks.weight"),
        ("run=nowhere", "nowhere holds no checkpoint"),
        ("out=.", "out=. is not empty"),
        ("router_std=0", "router_std=0.001 works"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    to_experts, tmp_path, monkeypatch, capsys, override, message
):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert run_here(["convert", *to_experts, "out=experts", override]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_must_be_given(dense, capsys):
    assert run_here(["convert", f"run={dense}", "out=experts"]) == 2
    assert "model is required and was not given" in capsys.readouterr().err


def test_full_disk_leaves_nothing_behind(to_experts, tmp_path):
    out = tmp_path / "folder" / "experts"
    arguments = ["convert", *to_experts, f"out={out}"]
    log = run(arguments, tmp_path, expect=3, faults=Faults(max_file_bytes=50_000))
    assert "could not be written" in log
    assert not list((tmp_path / "folder").iterdir())
