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
    ("launcher=inline", "parallel.ring=2"): "parallel.ulysses=1 x parallel.ring=2 must divide the "
    "1 ranks that launcher=inline gives; use launcher=ray launcher.num_workers=2 or "
    "parallel.ring=1",
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
    ("launcher.num_workers=4", "parallel.ring=2", "parallel.dp=4"): "parallel.dp=4 x 2 sequence "
    "ranks must equal the 4 ranks that launcher=ray gives; use parallel.dp=2 or null",
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
}  # fmt: skip


def compose(given: tuple[str, ...]) -> Config:
    batch = ("data.micro_batch_size=1", "launcher=ray")
    return compose_config(*MODEL, *batch, *given)


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
    ],
    ids=" ".join,
)
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
