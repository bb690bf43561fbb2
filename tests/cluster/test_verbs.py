"""The verbs beside train: evaluate, generate, report, export, bench."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.runs import TINY, column, run, tiny
from safetensors.torch import load_file

from cluster.cli import run as run_here
from trainer.restore import restore_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(tiny(folder, f"run.dir={folder / 'run'}", "spike.enabled=true", "run.steps=3"), folder)
    return folder / "run"


@pytest.fixture(autouse=True)
def in_folder_of_the_run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.parent)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a verb in this process, as from the shell, and return what it printed."""
    assert run_here(list(arguments)) == 0
    return capsys.readouterr().out


def test_evaluate_gives_the_loss_of_the_last_evaluation(trained, capsys):
    out = call(capsys, "evaluate", f"run={trained}", "suites.validation.max_sequences=5")
    assert f"{column(trained, 'val_loss')[-1]:.4f}" in out


def test_evaluate_counts_spikes(trained, capsys):
    limits = ("suites.spikes.max_tokens=40", "suites.spikes.ks=[2.0]")
    spike = "spike={enabled:true,k:2.0,k_by_input:{layers.*.ffn.*:4.0}}"
    out = call(capsys, "evaluate", f"run={trained}", "suite=spikes", *limits, spike, "out=s.json")
    assert "by coding, k = config" in out
    by_k = {row["k"]: row for row in json.loads(Path("s.json").read_text())["rows"][:3]}
    assert by_k["off"]["perplexity"] == pytest.approx(by_k["2"]["perplexity"], rel=0.1)
    assert by_k["config"]["mean_spikes"] > by_k["2"]["mean_spikes"]


def test_inspect_shows_a_token(trained, capsys):
    place = ("token=2", "layer=1", "projection=o_proj", "outputs=3", "channels=4")
    out = call(capsys, "inspect", f"run={trained}", "prompt=axon", *place)
    assert "layers.1.mixer.branches.window.o_proj of" in out
    assert "token 2 of 4: 'o'" in out
    assert "All 32 products from trains, in 5 codings, equal those from counts bit for bit" in out


def test_generate_streams_the_same_text_for_the_same_seed(trained, capsys):
    arguments = ["generate", f"run={trained}", "prompt=axon ", "max_new_tokens=40"]
    first = call(capsys, *arguments, "stop_at_end=false")
    assert first.startswith("axon ")
    assert first == call(capsys, *arguments, "stop_at_end=false")
    assert first != call(capsys, *arguments, "stop_at_end=false", "seed=1")
    greedy = [call(capsys, *arguments, "temperature=0", f"seed={seed}") for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_generate_draws_no_padding_of_the_vocabulary(trained, capsys):
    out = call(
        capsys, "generate", f"run={trained}", "max_new_tokens=200", "temperature=50", "top_k=0",
        "stop_at_end=false",
    )  # fmt: skip
    assert len(out) > 100  # ids beyond 256 would have failed to decode


@pytest.mark.parametrize(
    "prompt", ["def f(x, y=1): ", "it's ", "a\\", "\\' ", "{[,]}", "'quoted '"]
)
def test_prompt_is_taken_as_it_is(trained, capsys, prompt):
    out = call(capsys, "generate", f"run={trained}", f"prompt={prompt}", "max_new_tokens=1")
    assert out.startswith(prompt.strip("'") if prompt.startswith("'") else prompt)


def test_generate_refuses_an_empty_prompt(trained, capsys):
    assert run_here(["generate", f"run={trained}", "prompt=''"]) == 2
    assert "prompt='' has no token" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_a_run_without_checkpoint_is_named(verb, tmp_path, capsys):
    assert run_here([verb, f"run={tmp_path}"]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_writes_the_weights(trained, tmp_path, dtype, capsys):
    call(capsys, "export", f"run={trained}", f"out={tmp_path / 'out'}", f"dtype={dtype}")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    model = restore_model(str(trained), torch.device("cpu")).model
    parameters = dict(model.named_parameters())
    assert weights.keys() == parameters.keys()
    for name, weight in weights.items():
        assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(weight, parameters[name].to(weight.dtype))


def test_export_lists_what_a_format_cannot_express(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_here(["export", f"run={trained}", f"out={out}", "format=huggingface"]) == 2
    message = "format=huggingface: huggingface cannot express the model: as "
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_report_is_written_again(trained, capsys):
    before = json.loads((trained / "report.json").read_text())
    for name in ("report.json", "report.html"):
        os.unlink(trained / name)
    call(capsys, "report", f"run={trained}")
    assert json.loads((trained / "report.json").read_text()) == before
    assert (trained / "report.html").exists()


@pytest.mark.slow
def test_bench_train_step_writes_rows_with_the_peer(tmp_path):
    small = [option for option in TINY if option.startswith("model.") and "mixers" not in option]
    out = tmp_path / "rows.json"
    arguments = [
        "bench", "suite=train_step", f"out={out}", "seq_len=64", "num_threads=1", "dtype=float32",
        "model.vocab_size=300", "model.mixers.full.num_heads=2",
        "model.mixers.full.num_kv_heads=1", "model.mixers.full.head_dim=16", *small,
    ]  # fmt: skip
    printed = run(arguments, tmp_path)
    context, *rows = json.loads(out.read_text())
    assert context["num_threads"] == 1
    assert context["measured_peak_flops"] > 0
    assert [row["metric"] for row in rows] == ["tokens_per_second", "step_seconds", "mfu"]
    speed, seconds, mfu = rows
    assert speed["peer"] == "transformers"
    assert speed["ratio"] == pytest.approx(speed["value"] / speed["peer_value"])
    assert speed["value"] == pytest.approx(64 / seconds["value"])
    assert mfu["ratio"] == pytest.approx(mfu["value"] / mfu["peer_value"])
    assert "transformers" in printed


def test_multirun_trains_one_after_another(tmp_path):
    log = run([*tiny(tmp_path, "run.steps=2", "optim.lr=1e-3,2e-3"), "-m"], tmp_path)
    first, second = (json.loads(p.read_text()) for p in tmp_path.glob("runs/*/report.json"))
    assert first["run"]["steps_done"] == second["run"]["steps_done"] == 2, log
    assert first["loss"] != second["loss"]
