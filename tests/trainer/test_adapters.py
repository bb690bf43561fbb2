"""Training of adapters on a mix of text and conversations: the base stays, runs go on, ranks agree,
and what follows is merged.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers.runs import column, run, run_ranks, tiny

from conf.schema import Config, build
from models.causal_lm import CausalLM
from models.lora import merge_adapters
from trainer.checkpoint import load_tensors, resolve
from trainer.model_state import load_weights
from trainer.restore import restore_model

STEPS = 6
ADAPTERS = "adapters={rank: 4, alpha: 8, targets: [q_proj, o_proj, ffn]}"


def train(folder: Path, name: str, *overrides: str) -> list[str]:
    every = ("checkpoint.every=2", "checkpoint.keep=9", "optim.schedule=constant", "optim.lr=0.01")
    return tiny(folder, *every, f"run.steps={STEPS}", f"run.dir={name}", *overrides)


def adapt(folder: Path, name: str, *overrides: str) -> list[str]:
    """Training of adapters, and of norms, on what the run `base` came to."""
    both = (ADAPTERS, "run.init_from=base", "objective.train='_norm[.]'")
    chats = folder / "chats.jsonl"
    if not chats.exists():
        records = [{"prompt": "spike?" * (i % 5), "response": "axon." * i} for i in range(1, 60)]
        chats.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = f"{{name: text, path: {folder / 'corpus.txt.jsonl'}, weight: 3}}"
    chat = f"{{name: chat, path: {chats}, weight: 2, source: chat, packing: domain}}"
    mix = ("data.source=mix", "data.path=null", f"+data.mix=[{text},{chat}]")
    return train(
        folder, name, *both, *mix, "+data.chat_template=chatml", "data.seq_len=64", *overrides
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of all runs here, and the runs `base` and `adapted`."""
    path = tmp_path_factory.mktemp("adapters")
    run(train(path, "base", "run.steps=2"), path)
    log = run(adapt(path, "adapted"), path)
    # Of 24 samples of 64 tokens 3 to 2, and conversations leave some room.
    seen = re.search(r"seen: text 896 tokens, .* epochs; chat (\d+) tokens, .* epochs", log)
    assert seen
    assert 500 < int(seen[1]) < 640
    return path


def read_run(folder: Path, name: str) -> tuple[Config, Path]:
    config = yaml.safe_load((folder / name / "config.yaml").read_text())
    return build(Config, config), resolve(folder / name)


def build_model(config: Config, *, has_adapters: bool) -> CausalLM:
    adapters = config.adapters if has_adapters else None
    return CausalLM(config.model, config.spike, config.ops, adapters=adapters)


def test_base_stays_and_has_no_moments(folder: Path) -> None:
    base, adapted = (load_tensors(read_run(folder, name)[1]) for name in ("base", "adapted"))
    learned = {name.removeprefix("exp_avg/") for name in adapted if name.startswith("exp_avg/")}
    assert learned
    assert all(".adapter." in name or "_norm." in name for name in learned)
    for name in base:
        if name.startswith("model/"):
            is_learned = name.removeprefix("model/") in learned
            assert torch.equal(adapted.get(name), base.get(name)) != is_learned, name
    for name in learned:
        if name.endswith(".adapter.b"):
            assert adapted.get(f"model/{name}").abs().max() > 0
    losses = column(folder / "adapted", "loss")
    assert losses[-1] < losses[0]


def test_resumed_run_is_the_run_that_was_never_stopped(folder: Path) -> None:
    for steps in (2, STEPS):
        run(adapt(folder, "resumed", f"run.steps={steps}"), folder)
    for key in ("loss", "grad_norm"):
        assert column(folder / "resumed", key) == column(folder / "adapted", key)
    tensors = [load_tensors(read_run(folder, name)[1]) for name in ("resumed", "adapted")]
    assert tensors[0].shapes == tensors[1].shapes
    assert all(torch.equal(*(t.get(name) for t in tensors)) for name in tensors[0])


def test_two_ranks_equal_one(folder: Path) -> None:
    run_ranks(adapt(folder, "two", "parallel.zero_stage=2"), folder)
    for key in ("loss", "grad_norm", "val_loss"):
        expected = column(folder / "adapted", key)
        assert column(folder / "two", key) == pytest.approx(expected, rel=1e-5), key


def test_whoever_has_no_adapters_reads_merged_weights(folder: Path) -> None:
    config, checkpoint = read_run(folder, "adapted")
    adapted = build_model(config, has_adapters=True)
    load_weights(adapted, checkpoint)
    merge_adapters(adapted)
    wanted = dict(adapted.named_parameters())
    restored = restore_model(str(folder / "adapted"), torch.device("cpu")).model
    for name, parameter in restored.named_parameters():
        assert torch.equal(parameter, wanted.pop(name)), name
    assert not wanted


def test_next_adapters_go_on_or_begin_anew_on_merged_weights(folder: Path) -> None:
    config, checkpoint = read_run(folder, "adapted")
    same, other = (build_model(config, has_adapters=True) for _ in range(2))
    load_weights(same, checkpoint)
    load_weights(other, checkpoint, seed=5)
    assert all(map(torch.equal, same.parameters(), other.parameters()))
    wider = CausalLM(
        config.model,
        config.spike,
        config.ops,
        adapters=type(config.adapters)(rank=4, alpha=4.0, targets=["v_proj", "ffn"]),
    )
    with pytest.raises(ValueError, match=r"no shard holds .*adapter"):
        load_weights(wider, checkpoint)
    load_weights(wider, checkpoint, seed=5)
    for model in (same, wider):
        merge_adapters(model)
    wanted = dict(same.named_parameters())
    assert all(torch.equal(p, wanted[name]) for name, p in wider.named_parameters())
