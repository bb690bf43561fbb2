"""Degrees of parallelism that cannot be are refused, and every remedy that is named works."""

import re

import pytest
from helpers.models import compose_config

from cluster.accelerators import load_accelerator
from conf.schema import Config
from trainer.checks import check_config

MODEL = (
    "+mixer@model.mixers.full=full_attention", "model.mixers.full.num_heads=6",
    "model.mixers.full.num_kv_heads=2", "model.mixers.full.head_dim=16", "dtype=float32",
    "model.layers=[{mixers:[linear],ffn:dense},{mixers:[window,full],ffn:dense}]",
)  # fmt: skip

REFUSED: dict[tuple[str, ...], str] = {
    # What is given: what the answer says. On Ray unless it says otherwise.
    ("launcher=inline", "parallel.ring=2"): "parallel.pp=1 x parallel.ulysses=1 x parallel.ring=2 "
    "must divide the 1 ranks that launcher=inline gives; use launcher=ray launcher.num_workers=2 "
    "or parallel.ring=1",
    ("launcher.num_workers=3", "parallel.ring=2"): "must divide the 3 ranks that launcher=ray "
    "gives; use launcher.num_workers=2 or launcher.num_workers=4 or parallel.ring=3 or "
    "parallel.ulysses=3 parallel.ring=1",
    ("launcher.num_workers=6", "parallel.ulysses=4", "data.global_batch_size=16"): "must divide "
    "the 6 ranks that launcher=ray gives; use launcher.num_workers=4 or launcher.num_workers=8 or "
    "parallel.ulysses=3 or parallel.ulysses=6",
    ("launcher.num_workers=6", "parallel.ring=4", "parallel.dp=2", "data.global_batch_size=16"): (
        "must divide the 6 ranks that launcher=ray gives; use launcher.num_workers=8 or "
        "parallel.ring=3 or parallel.ulysses=3 parallel.ring=1"
    ),
    ("launcher.num_workers=4", "parallel=ulysses_ring"): "parallel.ulysses=2 x parallel.ring=4 "
    "must divide the 4 ranks that launcher=ray gives; use launcher.num_workers=8 or "
    "parallel.ulysses=1 or parallel.ring=2",
    ("launcher.num_workers=4", "parallel.ring=2", "parallel.dp=4"): "parallel.dp=4 x parallel.pp=1 "
    "x 2 sequence ranks must equal the 4 ranks that launcher=ray gives; use parallel.dp=2 or null",
    ("launcher.num_workers=16", "parallel.ulysses=16"): "model.mixers.full: parallel.ulysses=16 "
    "would pad 6 query heads on 2 key heads to 16, more than twice as many; use "
    "parallel.ulysses=8 parallel.ring=2 or parallel.ulysses=4 parallel.ring=4",
    ("launcher.num_workers=5", "parallel.ulysses=5"): "model.mixers.full: parallel.ulysses=5 would "
    "pad 6 query heads on 2 key heads to 15, more than twice as many; use parallel.ulysses=1 "
    "parallel.ring=5",
    ("launcher.num_workers=4", "parallel=ring", "data.seq_len=7"): "data.seq_len=7 x "
    "data.micro_batch_size=1 tokens must be 8 at least, one for each segment that "
    "parallel.ulysses=1 x parallel.ring=4 in parallel.layout=zigzag has; use data.seq_len=8 or "
    "parallel.layout=contiguous or parallel.ulysses=4 parallel.ring=1 or parallel.ring=2",
    ("launcher.num_workers=8", "parallel.ring=8", "data.seq_len=3", "data.micro_batch_size=2"): (
        "data.seq_len=3 x data.micro_batch_size=2 tokens must be 8 at least, one for each segment "
        "that parallel.ulysses=1 x parallel.ring=8 in parallel.layout=contiguous has; use "
        "data.seq_len=4 or parallel.ring=4 or parallel.ring=2"
    ),
    ("launcher.num_workers=4", "parallel.pp=3"): "parallel.pp=3 x parallel.ulysses=1 x "
    "parallel.ring=1 must divide the 4 ranks that launcher=ray gives; use launcher.num_workers=3 "
    "or launcher.num_workers=6 or parallel.pp=2 or parallel.pp=1",
    ("launcher.num_workers=4", "parallel.pp=2", "parallel.dp=4"): "parallel.dp=4 x parallel.pp=2 "
    "x 1 sequence ranks must equal the 4 ranks that launcher=ray gives; use parallel.dp=2 or null",
    ("launcher.num_workers=8", "parallel.pp=8"): "parallel.pp=8 exceeds model.num_layers=3, and "
    "every stage needs a layer; use parallel.pp=2 or parallel.pp=1 or model.num_layers=8",
    ("launcher.num_workers=8", "parallel.pp=8", "parallel.dp=1"): "every stage needs a layer; use "
    "parallel.pp=2 parallel.dp=null or parallel.pp=1 parallel.dp=null or model.num_layers=8",
    ("launcher.num_workers=4", "parallel.pp=2", "parallel.zero_stage=2"): "parallel.pp=2 needs "
    "parallel.zero_stage of 1 at most and parallel.offload=none, not 2 and none; use "
    "parallel.zero_stage=1 or parallel.pp=1",
    ("launcher.num_workers=2", "parallel.pp=2", "parallel.zero_stage=3", "parallel.offload=all"): (
        "not 3 and all; use parallel.zero_stage=1 parallel.offload=none or parallel.pp=1"
    ),
    ("parallel.zero_stage=1", "parallel.offload=all"): "parallel.offload=all needs "
    "parallel.zero_stage of 3 at least, not 1; use parallel.zero_stage=3 or parallel.offload=none",
    ("launcher.num_workers=6", "parallel.pp=2"): "data.global_batch_size=8 must be a multiple of "
    "data.micro_batch_size=1 x 3 data ranks; use data.global_batch_size=6 or "
    "data.global_batch_size=9",
    ("parallel.ep=2", "launcher.num_workers=2"): "parallel.ep=2 needs a layer with experts, and "
    "model.layers has none; use parallel.ep=1",
    ("parallel.moe_recompute=layer",): "parallel.moe_recompute=layer needs a layer with experts, "
    "and model.layers has none; use parallel.moe_recompute=none",
    ("parallel.recompute_above=64",): "parallel.recompute_above=64 needs a layer with experts, and "
    "model.layers has none; use parallel.recompute_above=null",
    ("parallel.hot_experts=2",): "parallel.hot_experts=2 needs a layer with experts, and "
    "model.layers has none; use parallel.hot_experts=0",
    ("model=tiny_moe", "parallel.ep=2", "launcher.num_workers=1"): "parallel.ep=2 must divide "
    "model.ffns.moe.moe.num_experts=8 and the 1 ranks of a pipeline stage; use parallel.ep=1",
    ("model=tiny_moe", "parallel.ep=3", "launcher.num_workers=12", "data.global_batch_size=12"): (
        "model.ffns.moe.moe.num_experts=8 and the 12 ranks of a pipeline stage; use parallel.ep=4 "
        "or parallel.ep=2"
    ),
    ("model=tiny_moe", "parallel.ep=8", "launcher.num_workers=8", "parallel.pp=2"): (
        "num_experts=8 and the 4 ranks of a pipeline stage; use parallel.ep=4 or parallel.ep=2"
    ),
    ("model=tiny_moe", "parallel.ep=2", "launcher.num_workers=2", "parallel.zero_stage=3"): (
        "parallel.ep=2 needs parallel.zero_stage of 2 at most, not 3; use parallel.zero_stage=2 or "
        "parallel.ep=1"
    ),
    ("model=tiny_moe", "parallel.ep=2", "launcher.num_workers=2", "parallel.zero_stage=3",
     "parallel.offload=all"): "use parallel.zero_stage=2 parallel.offload=optimizer or "
    "parallel.ep=1",
    ("model=tiny_moe", "parallel.hot_experts=1", "model.ffns.moe.moe.capacity=1.5"): (
        "parallel.hot_experts=1 cannot be with model.ffns.moe.moe.capacity=1.5, which gives every "
        "expert as many tokens; use parallel.hot_experts=0 or model.ffns.moe.moe.capacity=null"
    ),
    ("model=tiny_moe", "launcher.num_workers=1", "spike.rate_weight=0.5", "model.num_sinks=4"): (
        "spike.rate_weight=0.5 with experts and model.num_sinks=4: experts cannot tell the sinks "
        "of each rank from tokens; use spike.rate_weight=0 or model.num_sinks=0"
    ),
}  # fmt: skip


def compose(given: tuple[str, ...]) -> Config:
    batch = ("data.micro_batch_size=1", "launcher=ray")
    model = ("dtype=float32",) if "model=tiny_moe" in given else MODEL
    return compose_config(*model, *batch, *given)


def check(config: Config) -> None:
    check_config(config, load_accelerator("cpu"), config.launcher.num_workers)


@pytest.mark.parametrize("given", REFUSED, ids=" ".join)
def test_refused_with_remedies_that_work(given: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"; use ") as caught:
        check(compose(given))
    text = str(caught.value)
    assert text.endswith(REFUSED[given])
    remedies = text.rpartition("; use ")[2].split(" or ")
    for remedy in remedies:
        overrides = ("parallel.dp=null",) if remedy == "null" else tuple(remedy.split())
        assert all(re.fullmatch(r"[a-z_.]+=\w+", override) for override in overrides)
        check(compose((*given, *overrides)))


@pytest.mark.parametrize(
    "given",
    [
        ("launcher.num_workers=4", "parallel=ulysses"),
        ("launcher.num_workers=4", "parallel=ring"),
        ("launcher.num_workers=8", "parallel=ulysses_ring"),
        ("launcher.num_workers=8", "parallel.ulysses=8"),
        ("launcher.num_workers=6", "parallel.ulysses=3", "parallel.dp=2"),
        ("launcher.num_workers=1", "parallel.layout=zigzag", "parallel.sync=barrier"),
        ("launcher.num_workers=4", "parallel=ring", "data.seq_len=4", "data.micro_batch_size=2"),
        ("launcher.num_workers=6", "parallel.pp=3", "parallel.ring=2", "parallel.zero_stage=1"),
        ("model=tiny_moe", "launcher.num_workers=8", "parallel.pp=2", "parallel.ep=4",
         "parallel.ulysses=2", "parallel.dp=2"),
        ("model=tiny_moe", "launcher.num_workers=2", "parallel.zero_stage=3",
         "parallel.offload=all", "parallel.moe_recompute=layer", "parallel.recompute_above=64"),
        ("model=tiny_moe", "launcher.num_workers=4", "parallel.ep=2", "parallel.hot_experts=2",
         "parallel.zero_stage=2", "parallel.offload=optimizer"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_accepted(given: tuple[str, ...]) -> None:
    check(compose(given))


def test_heads_matter_to_full_attention_alone() -> None:
    """A window or a mixer that no layer has is not shared out by heads."""
    layers = "model.layers=[{mixers:[linear,window],ffn:dense}]"
    check(compose(("launcher.num_workers=16", "parallel.ulysses=16", layers)))


def test_ranks_of_env_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(("launcher=env", "parallel.ring=4", "data.global_batch_size=16"))
    with pytest.raises(ValueError, match=r"use WORLD_SIZE=4 or WORLD_SIZE=8 or parallel.ring="):
        check_config(config, load_accelerator("cpu"), 6)


@pytest.mark.parametrize("name", ["ulysses", "ring", "ulysses_ring", "zero"])
def test_presets_compose(name: str) -> None:
    parallel = compose_config(f"parallel={name}").parallel
    assert (parallel.ulysses > 1) == ("ulysses" in name)
    assert (parallel.ring > 1) == ("ring" in name)
    assert (parallel.layout == "zigzag") == ("ring" in name)
