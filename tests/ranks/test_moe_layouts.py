"""A hybrid with experts trains alike, whichever ranks share data, experts, layers and sequences."""

import json
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.assertions import assert_close
from helpers.runs import column, run, run_ranks, tiny
from safetensors.torch import load_file

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


class Runs:
    """Runs by their layout and overrides, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: dict[tuple[Layout, tuple[str, ...]], str] = {}

    def __call__(self, layout: Layout, *overrides: str) -> Path:
        """Return the run directory."""
        key = layout, overrides
        if key not in self._names:
            self.go_on(f"run-{len(self._names)}", layout, *overrides)
            self._names[key] = f"run-{len(self._names)}"
        return self.folder / self._names[key]

    def go_on(self, name: str, layout: Layout, *overrides: str) -> Path:
        """Start or continue the run `name` in a layout."""
        arguments = train(self.folder, name, *layout.overrides, *overrides)
        run_ranks(arguments, self.folder, faults=(None,) * layout.num_ranks)
        return self.folder / name


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    return Runs(folder)


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


ONE = Layout()
SOFTMAX = ("data.seq_len=203",)
SIGMOID = (
    "data.seq_len=250", "model.ffns.moe.moe.num_experts=4", "model.ffns.moe.moe.top_k=2",
    "model.ffns.moe.moe.score=sigmoid", "model.ffns.moe.moe.normalize=true",
    "model.ffns.moe.moe.bias_rate=0.01", "model.tie_embeddings=false",
)  # fmt: skip
# The first of two stages has no experts.
LATE = (
    "data.seq_len=101", "model.layers=[{mixers:[linear,window],ffn:dense},"
    "{mixers:[linear,window],ffn:dense},{mixers:[linear,full],ffn:moe},"
    "{mixers:[linear,window],ffn:moe}]",
)  # fmt: skip
FULL = ("parallel.recompute=full",)
ROWS = [
    (Layout(dp=2, ep=2, zero=1), SIGMOID, ("parallel.offload=optimizer",)),
    (Layout(dp=4, ep=4, zero=2), SOFTMAX, FULL),
    (Layout(ep=2, ulysses=2, zero=2), SOFTMAX, ()),
    (Layout(dp=2, ep=4, ring=2), SIGMOID, FULL),
    (Layout(dp=2, zero=3), SOFTMAX, ("parallel.recompute=selective",)),
    (Layout(pp=2), SOFTMAX, ()),
    (Layout(pp=2, dp=2, ep=2, zero=1), SIGMOID, FULL),
    (Layout(pp=2, dp=2, ep=2, zero=1), LATE, ("parallel.moe_recompute=activation",)),
    (Layout(pp=2, ep=2, ring=2), SOFTMAX, ()),
    (Layout(pp=2, dp=2, ep=4, ulysses=2, zero=1), SIGMOID, ()),
]


@pytest.mark.parametrize(
    ("layout", "model", "overrides"), ROWS, ids=[f"{row[0].id}-{row[1][0]}" for row in ROWS]
)
def test_run_equals_one_rank(
    runs: Runs, layout: Layout, model: tuple[str, ...], overrides: tuple[str, ...]
) -> None:
    actual, expected = runs(layout, *model, *overrides), runs(ONE, *model)
    assert_same_metrics(actual, expected)
    assert_same_moments(actual, expected)


BIASED = ("data.seq_len=101", "model.ffns.moe.moe.bias_rate=0.001")
STEERED = [
    (Layout(dp=2, ep=2, zero=2), (3,), FULL),
    (Layout(dp=2, ep=4, ulysses=2, zero=1), (2, 5),
     ("parallel.hot_experts=2", "parallel.moe_recompute=experts")),
    (Layout(pp=2, ep=2, ring=2), (3,),
     ("parallel.hot_experts=1", "parallel.recompute_above=40")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "experts", "overrides"),
    STEERED,
    ids=[f"{layout.id}-experts{experts}" for layout, experts, _ in STEERED],
)
def test_experts_without_tokens(
    runs: Runs, layout: Layout, experts: tuple[int, ...], overrides: tuple[str, ...]
) -> None:
    """Some ranks have nothing to compute, and all rows go to one or two others."""
    start = runs(ONE, *BIASED, "run.steps=1") / "checkpoints/step_00000001"
    steered = runs.folder / f"steered-{experts}" / "checkpoints"
    path = steered / start.name if steered.exists() else steer(start, steered, list(experts))
    resumed = (*BIASED, f"run.resume='{path}'")
    actual, expected = runs(layout, *resumed, *overrides), runs(ONE, *resumed)
    if len(experts) == 1:
        assert column(expected, "router_max_load") == [8.0, 8.0]
    assert_same_metrics(actual, expected)
    assert_same_moments(actual, expected, step=2)


def test_bfloat16_errs_no_more_than_one_rank_does(runs: Runs) -> None:
    half = ("dtype=bfloat16",)
    exact, rounded = runs(ONE, *LATE), runs(ONE, *LATE, *half)
    many = runs(Layout(pp=2, dp=2, ep=2, zero=1), *LATE, *half)
    for key in ("loss", "grad_norm", "val_loss"):
        values = column(exact, key)
        errors = [
            max(abs(x / y - 1) for x, y in zip(column(path, key), values, strict=True))
            for path in (many, rounded)
        ]
        assert errors[0] < max(2 * errors[1], 1e-3), (key, errors)


def test_first_step_with_spikes_equals_one_rank(runs: Runs) -> None:
    spikes = ("data.seq_len=101", "spike.enabled=true", "run.steps=1")
    spikes += ("model.ffns.moe.moe.spiking_router=true",)
    actual, expected = runs(Layout(dp=2, ep=2, zero=2), *spikes), runs(ONE, *spikes)
    assert_same_metrics(actual, expected)
    assert_same_moments(actual, expected)


def test_run_moves_between_layouts(runs: Runs) -> None:
    """Each station continues the run of the one before, with its data and the routers' state."""
    stations = [
        Layout(dp=4, ep=4, zero=1), ONE, Layout(pp=2, dp=2, ep=2, zero=1), Layout(dp=2, zero=3),
        Layout(pp=2), Layout(ep=2, ulysses=2, zero=2),
    ]  # fmt: skip
    model = (*SIGMOID, "evaluation.every=1")
    expected = runs(ONE, *model, f"run.steps={len(stations)}")
    for step, layout in enumerate(stations, 1):
        actual = runs.go_on("moves", layout, *model, f"run.steps={step}")
    assert_same_metrics(actual, expected)
    for step in (1, len(stations)):
        assert_same_moments(actual, expected, step)
    states = [load_state(path / f"checkpoints/step_{step:08d}") for path in (actual, expected)]
    assert states[0] == states[1]


def test_verbs_read_what_parts_wrote(runs: Runs) -> None:
    parts, folder = runs(Layout(pp=2, dp=2, ep=2, zero=1), *SIGMOID, *FULL), runs.folder
    log = run(["evaluate", f"run={parts}", "suites.validation.max_sequences=4"], folder)
    assert f"{column(parts, 'val_loss')[-1]:.4f}" in log
    texts = [
        run(["generate", f"run={path}", "prompt=axon", "max_new_tokens=8", "temperature=0"], folder)
        for path in (parts, runs(ONE, *SIGMOID))
    ]
    assert texts[0].splitlines()[-1] == texts[1].splitlines()[-1]
    run(["export", f"run={parts}", f"out={folder / 'out'}", "dtype=float32"], folder)
    exported = load_file(folder / "out/model.safetensors")
    tensors = load_tensors(parts / "checkpoints/step_00000003")
    names = {name.removeprefix("model/") for name in tensors if name.startswith("model/")}
    assert exported.keys() == names
    assert exported["layers.1.ffn.experts.down_proj"].shape == (4, 48, 32)
