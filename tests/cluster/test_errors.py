"""A wrong config ends with code 2, before anything starts, in a line that says what would work."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.runs import longaxon, run, tiny

from cluster import cli
from ops.registry import explain

Refuse = Callable[..., str]

WRONG = {
    # What is given: what the answer says, in order.
    "run.stps=3": "run.stps: no such key; there is run.steps",
    "modl=tiny": "modl: no such key; there is model",
    "+extra.key=1": "extra: no such key; there is model, data, optim, ",
    "+run.extra=1": "run.extra: no such key; there is run.",
    "model.mixers.linear.head_dims=8": "head_dims: no such key; there is model.mixers.linear.head_",
    "run.steps=many": "run.steps='many': input should be a valid integer; run.steps=300 works",
    "run.steps=1.5": "run.steps=1.5: input should be a valid integer; run.steps=300 works",
    "run.steps=???": "run.steps is required and was not given; add run.steps=...",
    "optim.lr=-1": "optim.lr=-1: input should be greater than or equal to 0; optim.lr=0.001 works",
    "optim.betas=[0.9]": "should have at least 2 items ... not 1; optim.betas=[0.9, 0.95] works",
    "parallel.zero_stage=4": "less than or equal to 3; parallel.zero_stage=0 works",
    "dtype=bfloat": "dtype='bfloat': input should be 'auto', 'float32' or 'bfloat16'; dtype=auto",
    "model=huge": "model=huge: no such choice; there is qwen2_5_7b, ... smollm2_135m, ... tiny",
    "launcher=slurm": "launcher=slurm: no such choice; there is env, inline, ray",
    "accelerator.name=npu": "accelerator.name=npu: no cluster/accelerators/npu.py; use cpu",
    "launcher.num_workers=2": "num_workers=2: launcher=inline runs one rank; use launcher=ray",
    "parallel.ring=2": "parallel.ulysses=1 x parallel.ring=2 must divide the 1 ranks that launcher="
    "inline gives; use launcher=ray launcher.num_workers=2 or parallel.ring=1",
    "parallel=ulysses": "ulysses=4 ... num_workers=4 or parallel.ulysses=1",
    "parallel.pp=2": "parallel.pp=2 x ... must divide the 1 ranks ... use launcher=ray launcher.",
    "parallel.ep=2": "parallel.ep=2 needs a layer with experts ... use parallel.ep=1",
    "parallel.sync=all": "parallel.sync='all': input should be 'none', 'device' or 'barrier'; para",
    "parallel.layout=striped": "layout='striped': input should be 'contiguous' or 'zigzag'; parall",
    "parallel.linear=ring": "parallel.linear='ring': input should be 'gather' or 'scan'; parallel",
    "parallel.timeout_seconds=0": "timeout_seconds=0: input should be greater than 0; ... works",
    "parallel.dp=3": "dp=3 x parallel.pp=1 x 1 sequence ... equal the 1 ranks ... dp=1 or null",
    "parallel.offload=optimizer": "offload=optimizer needs ... not 0; use parallel.zero_stage=1 or",
    "data.global_batch_size=7": "size=7 must be a multiple of data.micro_batch_size=8 ... size=8",
    "data.tokenizer=nowhere": "data.tokenizer='nowhere': there is no file ... use bytes",
    "data.path=here.txt": "data.path='here.txt' has no meaning ... use data=text",
    "model.vocab_size=256": "model.vocab_size=256 is below the 257 ... use model.vocab_size=264",
    "model.mixers.linear.num_heads=3": "model.mixers.linear.num_kv_heads=2 must divide num_heads=3"
    "; num_kv_heads=1 and 3 do",
    "model.mixers.window.head_dim=31": "model.mixers.window.head_dim=31 must be even",
    "model.mixers.linear._target_=os.system": "_target_ 'os.system' is outside models.mixers",
    "model.layers=[{mixers:[gla],ffn:dense}]": "layers[0].mixers names 'gla', ... linear, window",
    "model.layers=[{mixers:[linear],ffn:moe}]": "model.layers[0].ffn='moe' ... use one of dense",
    "spike.k_by_input={layers.9.*:2.0}": "'layers.9.*' matches none of the inputs, which are lay",
    "spike.k_by_input={layers.*:0.0}": "layers.*=0.0: input should be greater than 0",
    "optim.warmup_steps=400": "steps=400 exceeds run.steps=300; use optim.warmup_steps=30",
    "optim.schedule=wsd": "decay_steps=0: ... needs 1 to 280 ... use optim.decay_steps=60",
    "ops.spike=triton": "ops.spike=triton: ... TRITON_INTERPRET=1; what runs here: ... torch",
    "run.resume=nowhere": "nowhere holds no checkpoint; ... or run.resume=never",
    "run.dir=''": "run.dir='' names no folder; use run.dir=null",
}


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run the command inside `tmp_path`, and undo what it changes in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    explain.cache_clear()  # what the interpreter made possible
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refuse:
    """Run the command in this process; return the one line it answers."""

    def run_command(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert cli.run(list(arguments)) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before, "something was started"
        return output.err

    return run_command


def assert_says(line: str, parts: str) -> None:
    position = 0
    for part in parts.split(" ... "):
        assert part in line[position:], f"{part!r} is not in {line!r}, or too early"
        position = line.index(part, position)


@pytest.mark.parametrize("override", WRONG)
def test_wrong_value_is_named_with_one_that_works(refused: Refuse, override: str) -> None:
    line = refused("train", override)
    assert line.startswith("longaxon train: ")
    assert_says(line, WRONG[override])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("null", "data.path=None names no files ... set data.path to files, folders or globs"),
        ("missing.txt", "data.path='missing.txt' matches no file; check the path"),
        ("folder", "data.path='folder' is a folder without files that end in ... by a glob"),
        ("empty.txt", "data.path='empty.txt' matches empty files only ... name other files"),
    ],
)
def test_data_that_is_not_there(refused: Refuse, tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    assert_says(refused("train", "data=text", f"data.path={path}"), message)


def test_field_that_records_lack(refused: Refuse, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": "x"}))
    line = refused("train", "data=text", "data.path=a.jsonl")
    assert_says(line, "data.text_key='text' is no field ... holds the text: content")


def test_several_wrong_values_are_all_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "run.steps=0", "optim.lr=x"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "run.steps=0" in first
    assert "optim.lr='x'" in second


def test_ranks_of_env_need_a_place_to_meet(
    refused: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    line = refused("train", "launcher=env")
    assert_says(line, "WORLD_SIZE=2 needs MASTER_ADDR and MASTER_PORT ... torchrun sets them")
    monkeypatch.setenv("RANK", "2")
    assert_says(refused("train", "launcher=env"), "RANK=2 must be in 0..WORLD_SIZE-1=1")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/longaxon"])
def test_run_dir_that_cannot_be_a_folder(refused: Refuse, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    line = refused("train", f"run.dir={place}")
    assert_says(line, f"run.dir={place} must be a folder that can be written ... another run.dir")


def test_run_dir_of_a_live_run(refused: Refuse, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with FileLock(tmp_path / "taken" / ".lock"):
        line = refused("train", "run.dir=taken")
    assert_says(line, "run.dir=taken: another process is training there; ... another run.dir")


@pytest.mark.slow
def test_run_dir_of_a_run_with_another_config(refused: Refuse, tmp_path: Path) -> None:
    run(tiny(tmp_path, "run.dir=old", "run.steps=2"), tmp_path)
    line = refused(*tiny(tmp_path, "run.dir=old", "run.steps=2", "model.hidden_size=48"))
    assert_says(line, "model.hidden_size=48: the run in old was started with 32; use that value")
    checkpoint = "run.resume=old/checkpoints/step_00000002"
    line = refused(*tiny(tmp_path, "run.dir=old", checkpoint))
    assert_says(line, "lies in run.dir=old itself; use run.resume=auto")


def test_verb_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["trian"]) == 2
    assert "no verb 'trian'\nusage: longaxon <verb>" in capsys.readouterr().err
    assert cli.run([]) == 2
    assert cli.run(["--help"]) == 0
    assert "train " in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["evaluate", "generate", "report"])
def test_verb_without_its_run(refused: Refuse, verb: str) -> None:
    assert refused(verb) == f"longaxon {verb}: run is required and was not given; add run=...\n"
    assert "nowhere" in refused(verb, "run=nowhere")


def test_command_refuses_quickly(tmp_path: Path) -> None:
    start = time.monotonic()
    wrong_key = longaxon(["train", "run.stps=3"], tmp_path)
    between = time.monotonic()
    wrong_sum = longaxon(["train", "data.global_batch_size=7"], tmp_path)
    assert (wrong_key.returncode, wrong_sum.returncode) == (2, 2)
    assert wrong_key.stderr.startswith("longaxon train: run.stps: no such key; ")
    # On an idle machine it is 0.6 and 2 seconds.
    assert between - start < 10
    assert time.monotonic() - between < 10
    assert list(tmp_path.iterdir()) == []
