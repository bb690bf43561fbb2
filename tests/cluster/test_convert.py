"""longaxon convert: a dense run becomes experts, which evaluate and train on several ranks; a
checkpoint of Transformers is imported and becomes a hybrid.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.foreign import build_imported, make_transformers
from helpers.models import compose_tree, one_rank_context
from helpers.runs import Faults, column, run, run_ranks, tiny

from cluster.cli import run as run_here
from conf.schema import ConvertConfig, build
from models.io import read_foreign
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
    return [f"source={dense}", "model=tiny", SINKS, *shape, *EXPERTS]


def val_loss(run_dir: Path) -> float:
    suite = ValidationSuite(max_sequences=5)
    return suite.evaluate(restore_model(str(run_dir), CPU)).rows[0]["val_loss"]


def test_experts_of_a_dense_run_evaluate_and_train(dense, to_experts, tmp_path, capsys):
    out, new = tmp_path / "experts", tmp_path / "new"
    assert run_here(["convert", *to_experts, f"out={out}"]) == 0
    checkpoint = out / "checkpoints" / "step_00000000"
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(checkpoint)
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
        checkpoint = convert_run(config, max_shard_bytes=max_shard_bytes).checkpoint
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
        ("source=nowhere", "nowhere holds no checkpoint"),
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


LINEAR = "pattern.mixers.linear"
HYBRID = ("pattern=inter_layer", "pattern.window_size=20", "pattern.keep_full=[2]",
          "pattern.layers=[[window],[window],[linear]]", f"{LINEAR}.gate_rank=2")  # fmt: skip


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of three layers, and one with a run that begins with it."""
    folder = tmp_path_factory.mktemp("foreign")
    make_transformers("llama", vocab_size=264).save_pretrained(folder / "llama")
    assert run_here(["convert", f"source={folder / 'llama'}", f"out={folder / 'run'}"]) == 0
    return folder


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    tensors = load_tensors(run_dir / "checkpoints" / "step_00000000")
    return {name: tensors.get(name) for name in tensors}


def test_an_imported_model_is_a_run(foreign, tmp_path, capsys):
    expected = build_imported(read_foreign(str(foreign / "llama")))
    model = restore_model(str(foreign / "run"), CPU).model
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        found, wanted = (m.hidden(tokens, one_rank_context([40])) for m in (model, expected))
    assert torch.equal(found, wanted)
    origins = {row["origin"] for row in conversion(foreign / "run")["tensors"]}
    assert origins == {"copied"}
    # A run can be converted as what it was imported from.
    for name in ("llama", "run"):
        out = tmp_path / name
        assert run_here(["convert", f"source={foreign / name}", f"out={out}", *HYBRID]) == 0
    from_llama, from_run = weights(tmp_path / "llama"), weights(tmp_path / "run")
    assert from_llama.keys() == from_run.keys()
    assert all(torch.equal(from_run[name], tensor) for name, tensor in from_llama.items())


def conversion(run_dir: Path) -> dict:
    return json.loads((run_dir / "conversion.json").read_text())


def test_a_hybrid_says_what_is_new_and_trains(foreign, dense, tmp_path, capsys):
    out, new = tmp_path / "hybrid", tmp_path / "new"
    changes = [f"{LINEAR}.feature_map=hedgehog", f"{LINEAR}.half_life=[9.0,90.0]"]
    pattern = [*HYBRID[:2], "pattern.layers=[[window],[linear],[source]]", f"{LINEAR}.gate_rank=2"]
    arguments = ["convert", f"source={foreign / 'llama'}", f"out={out}", *pattern, *changes]
    assert run_here([*arguments, "spike.enabled=true", "spike.k=2.0", "table=true"]) == 0
    printed = capsys.readouterr().out
    # Gate, feature maps of 4 query and 2 key heads, norm.
    added = {"gk_proj.0.weight": 48 * 2, "gk_proj.1.weight": 2 * 64, "gk_proj.1.bias": 64,
             "q_features.proj.weight": 4 * 256, "k_features.proj.weight": 2 * 256,
             "g_norm.weight": 16}  # fmt: skip
    told = conversion(out)
    assert {
        row["name"]: row["parameters"] for row in told["tensors"] if row["origin"] == "new"
    } == {f"layers.1.mixer.branches.linear.{name}": size for name, size in added.items()}
    summary, count = told["summary"]["linear_attention"], sum(added.values())
    kept = 48 + 2 * 48 * (64 + 32)
    assert summary == {
        "copied": kept, "transformed": 0, "new": count, "parameters": kept + count,
        "new_fraction": count / (kept + count),
    }  # fmt: skip
    assert told["summary"]["all"]["new"] == count
    table = [line.split() for line in printed.splitlines()]
    assert ["layers.1.mixer.branches.linear.gk_proj.0.weight", "2x48", "new"] in table
    copied = "layers.{}.mixer.branches.{}.q_proj.weight"
    assert [copied.format(1, "linear"), "64x48", "copied", copied.format(1, "full")] in table
    assert table[-1] == [str(out / "checkpoints" / "step_00000000")]

    config = ["train", "--config-dir", str(out), "--config-name", "config", f"run.dir={new}"]
    run_settings = [override for override in tiny(dense.parent)[2:] if "model." not in override]
    settings = [*(s for s in run_settings if s != "tracking=none"), "tracking.mlflow=false"]
    data = ["data.source=text", f"data.path={dense.parent / 'corpus.txt.jsonl'}"]
    log = run([*config, *data, *settings, "data.tokenizer=bytes"], tmp_path)
    assert f"continuing from {out}" in log
    assert column(new, "loss")[0] > column(new, "loss")[-1]
    assert column(new, "spike_sparsity")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pattern=inter_layer", "pattern.layers=[[linear],[window]]"], "do not fit 3 layers"),
        (["pattern=inter_layer", "model=tiny"], "model and pattern both say what to make"),
        (["spike.k=-1.0"], "k=-1"),
        (["source=nowhere.gguf"], "there is no nowhere.gguf"),
        (["+spike.kk=2"], "kk"),
        (["model=tiny"], "let it be the same in:"),
        (
            ["model=tiny", "model.layers=[{mixers:[lin],ffn:dense}]"],
            "names 'lin', which model.mixers",
        ),
    ],
)
def test_what_cannot_become_a_hybrid_is_refused(foreign, tmp_path, capsys, overrides, message):
    out = tmp_path / "hybrid"
    assert run_here(["convert", f"source={foreign / 'run'}", f"out={out}", *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_hybrid_is_no_source_of_a_pattern(dense, tmp_path, capsys):
    arguments = [f"source={dense}", f"out={tmp_path / 'out'}", "pattern=intra_layer"]
    assert run_here(["convert", *arguments]) == 2
    assert "layers have linear (LinearAttentionConfig), window" in capsys.readouterr().err


def test_full_disk_leaves_nothing_behind(to_experts, tmp_path):
    out = tmp_path / "folder" / "experts"
    arguments = ["convert", *to_experts, f"out={out}"]
    log = run(arguments, tmp_path, expect=3, faults=Faults(max_file_bytes=50_000))
    assert "could not be written" in log
    assert not list((tmp_path / "folder").iterdir())
