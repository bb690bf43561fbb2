"""longaxon quantize: a run in INT8 that evaluates and generates, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from helpers.runs import run, tiny

from cluster.cli import run as run_here
from trainer.checkpoint import load_tensors

SMALL = ("samples=4", "seq_len=16", "max_sequences=5")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(tiny(folder, f"run.dir={folder / 'run'}", "run.steps=8", "optim.lr=1e-2"), folder)
    return folder / "run"


def test_a_run_in_int8_evaluates_and_generates(trained, tmp_path, capsys):
    out, rows = tmp_path / "int8", tmp_path / "rows.json"
    settings = ["quantization.state=int8", "quantization.head=int8", "decoded_tokens=12"]
    spike = "spike={enabled: true, k: 3.0}"
    arguments = [f"run={trained}", f"out={out}", spike, *settings, *SMALL]
    assert run_here(["quantize", *arguments, f"table={rows}"]) == 0
    printed = capsys.readouterr().out
    checkpoint = out / "checkpoints" / "step_00000000"
    assert printed.endswith(f"{checkpoint}\n")
    table = json.loads(rows.read_text())["rows"]
    assert [(row["model"], row["measured"]) for row in table] == [
        ("float", "forward"),
        ("float, spikes", "forward"),
        ("INT8 weights", "forward"),
        ("INT8 weights, keys, values", "forward"),
        ("float", "decoding"),
        ("INT8 weights, keys, values", "decoding"),
        ("INT8 weights, keys, values, state", "decoding"),
    ]
    assert all(0.9 < row["ratio"] < 1.1 for row in table)
    assert len({row["nats_per_token"] for row in table}) == len(table)

    tensors = load_tensors(checkpoint)
    name = "model/layers.0.ffn.up_proj"
    assert tensors.get(f"{name}.weight").dtype == torch.int8
    assert tensors.get(f"{name}.scale").dtype == torch.float32
    assert tensors.get("model/head.weight").dtype == torch.int8
    suite = ["suites.validation.max_sequences=5", f"out={tmp_path / 'val.json'}"]
    assert run_here(["evaluate", f"run={out}", *suite]) == 0
    (found,) = json.loads((tmp_path / "val.json").read_text())["rows"]
    assert found["val_loss"] == table[3]["nats_per_token"]
    assert run_here(["generate", f"run={out}", "max_new_tokens=3", "stop_at_end=false"]) == 0

    # Integers are at the end of the way.
    capsys.readouterr()
    again = ["train", "--config-dir", str(out), "--config-name", "config"]
    for arguments, message in (
        ([*again, f"run.dir={tmp_path / 'new'}"], "quantization"),
        (["quantize", f"run={out}", f"out={tmp_path / 'new'}"], "is in INT8 already"),
        (["export", f"run={out}", f"out={tmp_path / 'new'}"], "INT8"),
        ([*tiny(trained.parent), f"run.init_from={out}", f"run.dir={tmp_path / 'new'}"], "INT8"),
    ):
        assert run_here(arguments) == 2, arguments
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run=nowhere", "nowhere holds no checkpoint"),
        ("out=.", "out=. is not empty"),
        ("quantization.group_size=100", "multiple of 64"),
        ("quantization.kv_cache=int4", "quantization.kv_cache='int4'"),
        ("samples=0", "samples=128 works"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    trained, tmp_path, monkeypatch, capsys, override, message
):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert run_here(["quantize", f"run={trained}", "out=int8", override]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
