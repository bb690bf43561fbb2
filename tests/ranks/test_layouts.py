"""A hybrid trains alike in every layout: the whole command, and the gradients of every shard."""

import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.assertions import assert_close
from helpers.models import build_model, random_batch, tiny_model_config
from helpers.ranks import Setting, build_context
from helpers.ranks import run_ranks as run_workers
from helpers.runs import column, run, run_ranks, tiny

from parallel.mesh import World, close_mesh
from trainer.checkpoint import load_tensors

STEPS = 3
LAYERS = ("linear", "window", "full", "linear+window+full")
MIXERS = ("linear", "window", "full")
HEADS = tuple(
    f"model.mixers.{mixer}.{key}={value}"
    for mixer in MIXERS
    for key, value in (("num_heads", 6), ("num_kv_heads", 2))
)
# With heads of 8 channels some queries of linear attention are all but zero behind the relu, their
# norm divides by next to nothing, and two runs of one rank whose weights differ in the last bit
# are 1e-3 apart after ten steps. With 16 channels they stay within 1e-7.
HYBRID = (
    "+mixer@model.mixers.full=full_attention", "model.hidden_size=48", "model.num_layers=4",
    "model.layers=[" + ",".join(
        f"{{mixers:[{layer.replace('+', ',')}],ffn:dense}}" for layer in LAYERS
    ) + "]",
    *HEADS, *(f"model.mixers.{mixer}.head_dim=16" for mixer in MIXERS),
    "model.mixers.window.window_size=70", "model.num_sinks=4", "data.global_batch_size=3",
    "data.micro_batch_size=1", "data.val_fraction=0.1", "optim.schedule=constant",
    "evaluation.max_sequences=2", "checkpoint.every=1", "checkpoint.keep=9",
)  # fmt: skip


def train(folder: Path, name: str, *overrides: str) -> list[str]:
    """Return the arguments of a run of the hybrid in folder/name."""
    return tiny(folder, *HYBRID, f"run.steps={STEPS}", f"run.dir={name}", *overrides)


def describe(setting: Setting) -> tuple[str, ...]:
    return (
        f"parallel.ulysses={setting.ulysses}",
        f"parallel.ring={setting.ring}",
        f"parallel.layout={setting.layout}",
        f"parallel.linear={setting.linear}",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 2 to 3,000 tokens: some within a segment, some over all ranks."""
    path = tmp_path_factory.mktemp("layouts")
    rng = random.Random(0)
    words = ["axon", "spike", "long", "state", "window", "gate", "ring", "token"]
    sizes = [rng.choice([rng.randint(1, 40), rng.randint(100, 500)]) for _ in range(60)]
    texts = [" ".join(rng.choices(words, k=size)) for size in sizes]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (path / "corpus.txt.jsonl").write_text("".join(lines))
    return path


class OneRank:
    """Runs of one rank, each made once, that those of several are compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *overrides: str) -> Path:
        name = "-".join(["one", *(o.split("=")[1] for o in overrides)])
        if not (self.folder / name).exists():
            run(train(self.folder, name, *overrides), self.folder)
        return self.folder / name


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> OneRank:
    return OneRank(folder)


def assert_same_metrics(actual: Path, expected: Path) -> None:
    for key in ("loss", "grad_norm", "num_tokens", "val_loss", "val_bits_per_byte"):
        values = column(expected, key)
        assert values, f"{expected} has no {key}"
        assert column(actual, key) == pytest.approx(values, rel=1e-5), key


def first_gradients(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return what the first step leaves as first moments: 0.1 of every parameter's gradient."""
    tensors = load_tensors(run_dir / "checkpoints/step_00000001")
    return {name: tensors.get(name) for name in tensors if name.startswith("exp_avg/")}


def assert_all_close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Compare tensors by name, the worst one first."""
    assert actual.keys() == expected.keys()
    for name in sorted(expected, key=lambda n: -error({n: actual[n]}, {n: expected[n]})):
        assert_close(name, actual[name], expected[name], dtype)


def error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the relative error of all tensors together, in the Frobenius norm."""
    square = sum(float((actual[n].double() - e.double()).norm() ** 2) for n, e in expected.items())
    return (square / (sum(float(e.double().norm() ** 2) for e in expected.values()) or 1.0)) ** 0.5


BATCH_OF_SIX = ("data.global_batch_size=6", "data.micro_batch_size=3")
RUNS = [
    (Setting(2, 1, linear="scan"), 1000, (), ("parallel.zero_stage=1", "parallel.recompute=full")),
    (Setting(1, 2, "zigzag"), 1024, (), ("parallel.zero_stage=2", "parallel.offload=optimizer")),
    (Setting(3, 1), 1000, (), ("parallel.recompute=selective",)),
    (Setting(2, 2, "zigzag", "scan"), 1000, (), ("parallel.sync=barrier",)),
    (Setting(1, 2, linear="scan", dp=2), 1000, BATCH_OF_SIX, ("parallel.zero_stage=3",)),
    (Setting(2, 4, "zigzag"), 1024, (), ("parallel.recompute=full",)),
]


@pytest.mark.parametrize(
    ("setting", "seq_len", "batch", "overrides"), RUNS, ids=[f"{s.id}-T{n}" for s, n, _, _ in RUNS]
)
def test_run_equals_one_rank(
    folder: Path,
    one_rank: OneRank,
    setting: Setting,
    seq_len: int,
    batch: tuple[str, ...],
    overrides: tuple[str, ...],
) -> None:
    data = (f"data.seq_len={seq_len}", *batch)
    expected, name = one_rank(*data[:2]), f"{setting.id}-{seq_len}"
    arguments = train(folder, name, *data, *describe(setting), *overrides)
    run_ranks(arguments, folder, faults=(None,) * setting.num_ranks)
    assert_same_metrics(folder / name, expected)
    assert_all_close(first_gradients(folder / name), first_gradients(expected), torch.float32)


def test_a_token_or_two_per_rank(folder: Path, one_rank: OneRank) -> None:
    """Some ranks have no label, and every halo and state comes from far."""
    data = ("data.seq_len=9", "data.global_batch_size=6")
    arguments = train(folder, "short", *data, *describe(Setting(2, 2, "zigzag", "scan")))
    run_ranks(arguments, folder, faults=(None,) * 4)
    assert_same_metrics(folder / "short", one_rank(*data))


def test_bfloat16_errs_no_more_than_one_rank_does(folder: Path, one_rank: OneRank) -> None:
    data, half = "data.seq_len=1000", "dtype=bfloat16"
    exact, rounded = one_rank(data), one_rank(data, half)
    arguments = train(folder, "half", data, half, *describe(Setting(2, 2, "zigzag", "scan")))
    run_ranks(arguments, folder, faults=(None,) * 4)
    expected = first_gradients(exact)
    errors = [error(first_gradients(path), expected) for path in (folder / "half", rounded)]
    assert errors[0] < 1.2 * errors[1], errors
    for key in ("loss", "grad_norm"):
        values = column(exact, key)
        one, many = (
            max(abs(x / y - 1) for x, y in zip(column(path, key), values, strict=True))
            for path in (rounded, folder / "half")
        )
        assert many < 2 * one, (key, many, one)


def test_first_step_with_spikes_equals_one_rank(folder: Path, one_rank: OneRank) -> None:
    settings = ("data.seq_len=1000", "spike.enabled=true", "run.steps=1", "optim.warmup_steps=0")
    expected = one_rank(*settings)
    arguments = train(folder, "spikes", *settings, *describe(Setting(1, 2, "zigzag")))
    run_ranks(arguments, folder)
    assert_same_metrics(folder / "spikes", expected)


def test_run_moves_between_layouts(folder: Path, one_rank: OneRank) -> None:
    """Each station continues the run of the one before; they are evaluated alike, too."""
    data = ("data.seq_len=200", "data.global_batch_size=2", "optim.warmup_steps=0")
    expected = one_rank(*data, "run.steps=4", "evaluation.every=1")
    stations = [
        (Setting(), 0), (Setting(1, 2, "zigzag", "scan"), 2), (Setting(2, 1, dp=2), 3),
        (Setting(2, 1, linear="scan"), 1),
    ]  # fmt: skip
    for step, (setting, stage) in enumerate(stations, 1):
        station = (f"run.steps={step}", f"parallel.zero_stage={stage}", *describe(setting))
        arguments = train(folder, "moves", *data, *station)
        run_ranks(arguments, folder, faults=(None,) * setting.num_ranks)
    assert_same_metrics(folder / "moves", expected)


PACKED = [
    (Setting(1, 2, "zigzag", "scan"), (1000,), "none"),
    (Setting(2, 1, "contiguous", "gather"), (400, 600), "full"),
    (Setting(3, 1, "contiguous", "scan"), (300, 1, 723), "none"),
    (Setting(1, 3, "zigzag", "gather"), (20, 900, 80), "full"),
    # All documents end where segments do.
    (Setting(1, 4, "contiguous", "scan"), (250,) * 4, "full"),
    (Setting(2, 2, "zigzag", "gather"), (128,) * 8, "selective"),
    # The first rank has no label that counts.
    (Setting(4, 1, "contiguous", "gather"), (*(1,) * 256, 768), "none"),
    (Setting(2, 3, "zigzag", "scan"), (700, 300), "full"),
    (Setting(4, 2, "zigzag", "scan"), (700, 1, 299), "full"),
    (Setting(1, 8, "contiguous", "gather"), (1024,), "none"),
]


@pytest.mark.parametrize(
    ("setting", "lengths", "recompute"),
    PACKED,
    ids=[f"{s.id}-docs{len(n)}-T{sum(n)}-{r}" for s, n, r in PACKED],
)
def test_gradients_of_every_shard(
    setting: Setting, lengths: tuple[int, ...], recompute: str
) -> None:
    one = compute_gradients(World(0, 1, 0), Setting(), lengths, "none")
    close_mesh()
    many = run_workers(setting.num_ranks, compute_gradients, setting, lengths, recompute)
    layout = many[0]["layout"]
    assert sum(each["num_valid"] for each in many) == one["num_valid"]
    assert_close("loss", sum(each["loss"] for each in many), one["loss"], torch.float32)
    hidden = layout.restore([each["hidden"] for each in many])
    assert_close("hidden states", hidden, one["hidden"], torch.float64)
    sums = {n: sum(each["parameters"][n] for each in many) for n in one["parameters"]}
    assert_all_close(sums, one["parameters"], torch.float64)


def compute_gradients(
    world: World, setting: Setting, lengths: tuple[int, ...], recompute: str
) -> dict[str, Any]:
    """Return a rank's part of the gradient of every parameter and of its tokens' embeddings."""
    config = tiny_model_config(
        *LAYERS,
        overrides=(*HEADS, "model.mixers.window.window_size=70", "model.num_sinks=4"),
    )
    model = build_model(config, dtype=torch.float64, recompute=recompute).double()
    batch = random_batch(lengths, config.vocab_size)
    context = build_context(world, setting, batch.cu_seqlens)
    hidden: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, out: torch.Tensor) -> None:
        out.retain_grad()
        hidden.append(out)

    model.embed.register_forward_hook(keep)
    shard = context.layout.shard
    # Gates and statistics, float32 otherwise, stay float64: nothing is left but the order of sums.
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        loss, num_valid = model(shard(batch.tokens), shard(batch.labels), context)
        loss.backward()
    return {
        "loss": loss.detach(),
        "num_valid": int(num_valid),
        "hidden": hidden[0].grad,
        "parameters": {name: p.grad for name, p in model.named_parameters()},
        "layout": context.layout,
    }
