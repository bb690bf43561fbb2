"""A hybrid with experts trains alike however ranks share out data, experts, layers and sequences."""

import json
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.assertions import assert_close
from helpers.runs import column, run, run_ranks, tiny

from trainer.checkpoint import CheckpointStore, load_state, load_tensors

MIXERS = ("linear", "window", "full")
MODEL = (
    "model=tiny_moe", "model.hidden_size=48", "model.ffns.dense.intermediate_size=64",
    "model.ffns.moe.intermediate_size=32", "model.num_sinks=4",
    *(f"model.mixers.{mixer}.{key}" for mixer in MIXERS
      for key in ("num_heads=6", "num_kv_heads=2", "head_dim=16")),
    "model.mixers.window.window_size=70", "model.num_layers=4",
    "data.global_batch_size=4", "data.micro_batch_size=1", "data.val_fraction=0.1",
    "optim.schedule=constant", "optim.warmup_steps=0", "evaluation.max_sequences=4",
    "checkpoint.every=1", "checkpoint.keep=9",
)  # fmt: skip
METRICS = (
    "loss", "grad_norm", "num_tokens", "val_loss", "val_bits_per_byte", "router_max_load",
    "router_entropy", "router_drop_rate", "balance_loss", "z_loss",
)  # fmt: skip


class Layout(NamedTuple):
    """How ranks share out the work."""

    dp: int = 1
    ep: int = 1
    pp: int = 1
    ulysses: int = 1
    ring: int = 1
    zero: int = 0

    @property
    def num_ranks(self) -> int:
        return self.dp * self.pp * self.ulysses * self.ring

    @property
    def id(self) -> str:
        return f"dp{self.dp}-ep{self.ep}-pp{self.pp}-u{self.ulysses}-r{self.ring}-zero{self.zero}"

    @property
    def overrides(self) -> list[str]:
        degrees = [f"parallel.{key}={n}" for key, n in self._asdict().items() if key != "zero"]
        layout = "zigzag" if self.ring > 1 else "contiguous"
        return [*degrees, f"parallel.layout={layout}", f"parallel.zero_stage={self.zero}"]


def train(folder: Path, name: str, *overrides: str) -> list[str]:
    """Return the arguments of a run in folder/name."""
    arguments = tiny(folder, *MODEL, "run.steps=3", f"run.dir={name}", *overrides)
    return [a for a in arguments if "gate_rank" not in a]  # these gates are the keys


def train_in(layout: Layout, folder: Path, name: str, *overrides: str) -> list[str]:
    """Run the ranks of a layout to their end and return their logs."""
    arguments = train(folder, name, *layout.overrides, *overrides)
    return run_ranks(arguments, folder, faults=(None,) * layout.num_ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 2 to 3,000 tokens: some within a segment, some over all ranks."""
    path = tmp_path_factory.mktemp("moe")
    rng = random.Random(0)
    words = ["axon", "spike", "long", "state", "window", "gate", "ring", "token"]
    sizes = [rng.choice([rng.randint(1, 40), rng.randint(100, 500)]) for _ in range(60)]
    texts = [" ".join(rng.choices(words, k=size)) for size in sizes]
    (path / "corpus.txt.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


class OneRank:
    """Runs of one rank, each made once, that those of several are compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: dict[tuple[str, ...], str] = {}

    def __call__(self, *overrides: str) -> Path:
        if overrides not in self._names:
            self._names[overrides] = name = f"one-{len(self._names)}"
            run(train(self.folder, name, *overrides), self.folder)
        return self.folder / self._names[overrides]


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> OneRank:
    return OneRank(folder)


def assert_same_metrics(actual: Path, expected: Path) -> None:
    for key in METRICS:
        values = column(expected, key)
        assert values, f"{expected} has no {key}"
        assert column(actual, key) == pytest.approx(values, rel=1e-5, abs=1e-12), key


def assert_same_moments(actual: Path, expected: Path, step: int = 1) -> None:
    """Compare first moments: after the first step, 0.1 of the gradient of every parameter."""
    checkpoint = f"checkpoints/step_{step:08d}"
    tensors, wanted = (load_tensors(path / checkpoint) for path in (actual, expected))
    assert sorted(tensors) == sorted(wanted)
    for name in wanted:
        if name.startswith("exp_avg/") or ".router." in name:
            assert_close(name, tensors.get(name), wanted.get(name), torch.float32)


def steer(checkpoint: Path, out: Path, experts: list[int]) -> Path:
    """Copy a checkpoint such that tokens go to no experts but these; return the new one."""
    tensors, step = load_tensors(checkpoint), 1
    shard = {name: tensors.get(name) for name in tensors}
    for name, tensor in shard.items():
        if name.endswith("router.bias"):
            tensor[experts] = 100.0
    store = CheckpointStore(out, keep=1)
    store.begin(step)
    store.write_shard(step, 0, shard)
    return store.commit(step, load_state(checkpoint))


SOFTMAX = ("data.seq_len=333",)
SIGMOID = (
    "data.seq_len=250", "model.ffns.moe.moe.num_experts=4", "model.ffns.moe.moe.top_k=2",
    "model.ffns.moe.moe.score=sigmoid", "model.ffns.moe.moe.normalize=true",
    "model.ffns.moe.moe.bias_rate=0.01", "model.tie_embeddings=false",
)  # fmt: skip
FULL = ("parallel.recompute=full",)
ROWS = [
    (Layout(dp=2, ep=2, zero=1), SIGMOID, ()),
    (Layout(dp=4, ep=4, zero=2), SOFTMAX, FULL),
    (Layout(dp=1, ep=2, ulysses=2, zero=2), SOFTMAX, ()),
    (Layout(dp=2, ep=2, ring=2), SIGMOID, FULL),
    (Layout(pp=2, dp=2, ep=2, zero=1), SIGMOID, FULL),
    (Layout(pp=2, ep=1), SOFTMAX, ()),
    (Layout(pp=2, ring=2, ep=2), SOFTMAX, ()),
    (Layout(pp=2, dp=2, ulysses=2, ep=4, zero=1), SIGMOID, ()),
]


@pytest.mark.parametrize(
    ("layout", "model", "overrides"), ROWS, ids=[f"{row[0].id}-{row[1][0]}" for row in ROWS]
)
def test_run_equals_one_rank(
    folder: Path,
    one_rank: OneRank,
    layout: Layout,
    model: tuple[str, ...],
    overrides: tuple[str, ...],
) -> None:
    expected, name = one_rank(*model), f"{layout.id}-{len(model)}"
    train_in(layout, folder, name, *model, *overrides)
    assert_same_metrics(folder / name, expected)
    assert_same_moments(folder / name, expected)
