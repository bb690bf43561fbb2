"""Every sequence-parallel algorithm computes what one rank does: outputs and all gradients."""

from typing import Any

import pytest
import torch
from helpers.assertions import assert_close
from helpers.ranks import Setting, build_context, run_ranks

from parallel.mesh import World
from parallel.sequence import attention, delta_rule, linear_attention, short_conv

SINKS = 3
H, H_KV, D = 6, 2, 8


def make_inputs(name: str, num_rows: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(1, num_rows, *shape, generator=g, dtype=torch.float64)

    q, k, v = draw(H, D), draw(H_KV, D), draw(H_KV, D)
    if name.startswith("attention"):
        return {"q": q, "k": k, "v": v}
    if name.startswith("conv"):
        return {"x": draw(D), "weight": torch.randn(D, 4, generator=g, dtype=torch.float64)}
    if name.endswith("none"):
        decay = {}
    elif name.endswith("scalar"):
        decay = {"log_decay": -draw(H_KV).abs() * 0.1}
    else:
        decay = {"log_decay": -draw(H_KV, D).abs() * 0.1}
    if name.startswith("linear"):
        return {"q": q, "k": k, "v": v} | decay
    return {
        "q": q,
        "k": k / k.norm(dim=-1, keepdim=True),
        "v": v,
        "beta": draw(H_KV).sigmoid(),
    } | decay


def compute(name: str, x: dict[str, torch.Tensor], context) -> torch.Tensor:
    if name == "attention-full":
        return attention(**x, context=context)
    if name.startswith("attention"):
        return attention(**x, context=context, window_size=int(name.split("-")[1]))
    if name.startswith("conv"):
        return short_conv(x["x"], x["weight"], None, context, activation="silu")
    x = {"log_decay": None} | x
    if name.startswith("linear"):
        return linear_attention(**x, context=context)[0]
    return delta_rule(**x, context=context)[0]


def run_case(
    world: World, setting: Setting, name: str, lengths: tuple[int, ...], sinks: int
) -> dict[str, Any]:
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    context = build_context(world, setting, cu, num_sinks=sinks)
    T = int(cu[-1])
    inputs = make_inputs(name, sinks + T)
    dout = torch.randn(
        compute_shape(name, inputs), generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    local = {}
    for key, value in inputs.items():
        if key == "weight":
            local[key] = value.clone().requires_grad_()
        else:
            local[key] = torch.cat(
                [value[:, :sinks], context.layout.shard(value[:, sinks:])], 1
            ).requires_grad_()
    out = compute(name, local, context)
    part = torch.cat([dout[:, :sinks], context.layout.shard(dout[:, sinks:])], 1).clone()
    if context.layout.sp_rank:
        part[:, :sinks] = 0
    out.backward(part)
    return {
        "out": out.detach(),
        **{k: v.grad for k, v in local.items()},
        "layout": context.layout,
        "ledger": context.comm.ledger,
    }


def compute_shape(name, inputs):
    return next(iter(inputs.values())).shape


SETTINGS = [
    Setting(1, 2),
    Setting(1, 3, "zigzag", "scan"),
    Setting(2, 1, "contiguous", "scan"),
    Setting(3, 1),
    Setting(2, 2, "zigzag"),
    Setting(4, 1, "zigzag", "scan"),
    Setting(1, 4, "contiguous", "scan"),
    Setting(8, 1),
    Setting(1, 8, "zigzag", "scan"),
    Setting(3, 2, "zigzag", "gather"),
]
NAMES = [
    "attention-full",
    "attention-7",
    "attention-40",
    "attention-2",
    "linear-none",
    "linear-scalar",
    "linear-vector",
    "delta-none",
    "delta-scalar",
    "delta-vector",
    "conv",
]


@pytest.mark.parametrize("lengths", [(101,), (20, 50, 1, 30), (3, 97)], ids=str)
@pytest.mark.parametrize("sinks", [0, SINKS])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.id)
def test_equals_one_rank(setting, name, sinks, lengths):
    one = run_case(World(0, 1, 0), Setting(), name, lengths, sinks)
    from parallel.mesh import close_mesh

    close_mesh()
    many = run_ranks(setting.num_ranks, run_case, setting, name, lengths, sinks)
    layout = many[0]["layout"]
    for key in one:
        if key in ("layout", "ledger"):
            continue
        values = [each[key] for each in many]
        if key == "weight":
            assert_close(key, sum(values), one[key], torch.float64)
            continue
        tokens = layout.restore([x[:, sinks:] for x in values])
        assert_close(key, tokens, one[key][:, sinks:], torch.float64)
        if sinks:
            s = values[0][:, :sinks] if key == "out" else sum(x[:, :sinks] for x in values)
            assert_close(key + " sinks", s, one[key][:, :sinks], torch.float64)
