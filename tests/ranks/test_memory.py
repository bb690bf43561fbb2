"""What a rank keeps for its backward pass falls as 1 / ranks, in every kind of layer."""

from collections.abc import Callable

import pytest
import torch
from helpers.models import build_model, tiny_model_config
from helpers.ranks import Setting, build_context, run_ranks

from parallel.mesh import World
from parallel.sequence import SequenceContext, delta_rule
from trainer.bench.memory import saved_bytes

HIDDEN, D = 128, 32
OVERRIDES = (
    f"model.hidden_size={HIDDEN}",
    f"model.ffns.dense.intermediate_size={3 * HIDDEN}",
    f"model.mixers.linear.head_dim={D}",
    f"model.mixers.window.head_dim={D}",
    f"model.mixers.full.head_dim={D}",
    "model.mixers.full.num_kv_heads=4",
    "model.mixers.window.window_size=256",
)
TOKENS = {"linear": 8192, "window": 8192, "delta": 8192, "full": 2048}
"""In all; few where cost grows with their square."""
TOLERANCE = 0.15
"""Of a rank's share: halos, states, and what Ulysses keeps of its output in both layouts."""


def measure(world: World, setting: Setting, kind: str, sinks: int) -> int:
    """Return the bytes that this rank keeps for its backward pass."""
    bounds = torch.tensor([0, TOKENS[kind]], dtype=torch.int32)
    context = build_context(world, setting, bounds, num_sinks=sinks)
    model, compute = build_case(kind, context)
    return saved_bytes(compute, model)


def build_case(
    kind: str, context: SequenceContext
) -> tuple[torch.nn.Module | None, Callable[[], torch.Tensor]]:
    """Return a whole layer, or the delta rule by itself, on this rank's tokens."""
    rows = context.num_sinks + context.layout.num_tokens
    if kind == "delta":
        q, k, v = (torch.randn(1, rows, 2, D, requires_grad=True) for _ in range(3))
        beta, decay = torch.rand(1, rows, 2, requires_grad=True), -torch.rand(1, rows, 2) / 10
        k = torch.nn.functional.normalize(k, dim=3)
        return None, lambda: delta_rule(q, k, v, beta, decay, context)[0]
    model = build_model(tiny_model_config(kind, overrides=OVERRIDES)).layers["0"]
    x = torch.randn(1, rows, HIDDEN, requires_grad=True)
    return model, lambda: model(x, context)


@pytest.mark.parametrize(
    ("kind", "setting", "sinks"),
    [
        ("linear", Setting(1, 4, "contiguous", "scan"), 0),
        ("linear", Setting(2, 2, "zigzag", "gather"), 16),
        ("window", Setting(1, 4), 16),
        ("window", Setting(1, 4, "zigzag"), 0),
        ("full", Setting(1, 4), 0),
        ("full", Setting(1, 4, "zigzag"), 16),
        ("full", Setting(4, 1), 16),
        ("full", Setting(2, 2, "zigzag"), 0),
        ("delta", Setting(1, 4, "contiguous", "scan"), 0),
        ("delta", Setting(2, 2, "zigzag", "gather"), 0),
    ],
    ids=lambda value: value.id if isinstance(value, Setting) else str(value),
)
def test_memory_falls_with_the_ranks(kind: str, setting: Setting, sinks: int) -> None:
    alone = measure(World(0, 1, 0), Setting(), kind, sinks)
    kept = run_ranks(setting.num_ranks, measure, setting, kind, sinks)
    ratios = [each * setting.num_ranks / alone for each in kept]
    assert max(ratios) <= 1 + TOLERANCE, f"{ratios} of an even share"


def test_a_view_counts_as_all_that_it_keeps() -> None:
    x = torch.ones(100, requires_grad=True)
    weight = torch.nn.Linear(100, 100, bias=False)
    assert saved_bytes(lambda: (x * 2)[:1] * x[:1], weight) == 2 * 400
    assert saved_bytes(lambda: weight(x).exp(), weight) == 400 + 400
