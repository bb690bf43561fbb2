"""Routed experts that ranks share out, with length alignment and recomputation."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.assertions import assert_close
from helpers.moe import E, build_moe, define_moe, moe_config
from helpers.ranks import TIMEOUT_SECONDS, run_ranks

from conf.schema import MoEConfig, OpsConfig
from parallel.comm import Comm
from parallel.expert import is_expert
from parallel.layout import build_layout
from parallel.ledger import Ledger
from parallel.mesh import World, init_mesh
from parallel.pipeline import ModelPart
from parallel.recompute import Recompute, run_recomputed
from parallel.sequence import SequenceContext
from trainer.bench.memory import saved_bytes

SINKS, TOKENS, LOSS_SCALE = 3, 41, 0.7
DROPLESS = moe_config(num_experts=8, top_k=2, balance_loss=0.3, z_loss=0.02)
ALIGNED = dataclasses.replace(DROPLESS, capacity=0.8)
LEVELS = {
    "none": Recompute(),
    "activation": Recompute(moe="activation", above=8),
    "experts": Recompute(moe="experts"),
    "layer": Recompute(),
    "above": Recompute(above=8),
}
Results = dict[str, torch.Tensor]


def make_tokens(rank: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sinks and tokens of a rank, most of which choose the same experts, and a gradient."""
    generator = torch.Generator().manual_seed(1 + rank)
    rows = SINKS + num_tokens
    x, dout = (torch.randn(1, rows, E, generator=generator) for _ in range(2))
    return 0.5 * x + torch.randn(E, generator=torch.Generator().manual_seed(0)), dout


def compute(world: World, ep: int, config: MoEConfig) -> dict[str, tuple[Results, dict[Any, Any]]]:
    """Return for each level what this rank computes, and the calls and bytes of its ledger."""
    mesh = init_mesh(world, torch.device("cpu"), "gloo", TIMEOUT_SECONDS, ring=2, ep=ep)
    dist.barrier()
    bounds = torch.tensor([0, TOKENS], dtype=torch.int32)
    layout = build_layout(bounds, sp_rank=mesh.sp_rank, sp_size=mesh.sp_size)
    part = ModelPart(ep_rank=mesh.ep.index, ep_size=ep)
    results = {}
    for level, recompute in LEVELS.items():
        ledger = Ledger()
        context = SequenceContext(
            layout, OpsConfig(), Comm(mesh, ledger), num_sinks=SINKS, aux_loss_scale=LOSS_SCALE
        )
        layer = build_moe(config, part=part, recompute=recompute)
        x, dout = make_tokens(world.rank, layout.num_tokens)
        x.requires_grad_()
        out = run_recomputed(layer, x, context, when=level == "layer")
        out.backward(dout)
        assert x.grad is not None
        routing = layer.router.take_routing()
        values = {
            "out": out.detach(),
            "dx": x.grad,
            "routing": routing.flatten()[:-1],
            "dropped": routing.dropped,
            "recomputed": routing.recomputed,
        }
        values |= {f"d{n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
        entries = {
            name: (entry.calls, entry.bytes)
            for (axis, name, _), entry in ledger.entries.items()
            if axis == "ep"
        }
        results[level] = values, entries
    return results


@pytest.mark.parametrize("config", [DROPLESS, ALIGNED], ids=["dropless", "aligned"])
@pytest.mark.parametrize(("ranks", "ep"), [(2, 2), (4, 2), (4, 4)])
def test_ranks_compute_their_definition_whatever_is_recomputed(
    ranks: int, ep: int, config: MoEConfig
) -> None:
    levels = run_ranks(ranks, compute, ep, config)
    results = [level["none"] for level in levels]
    whole = build_moe(config)
    weights = {n: p.detach().double().requires_grad_() for n, p in whole.named_parameters()}
    load = whole.router.load.double()
    tokens = [TOKENS // 2, TOKENS - TOKENS // 2]
    for rank, (values, _) in enumerate(results):
        x, dout = make_tokens(rank, tokens[rank % 2])
        x = x[0].double().requires_grad_()
        defined = define_moe(
            weights, x, config, load=load, num_sinks=SINKS, loss_scale=LOSS_SCALE,
            num_rows=SINKS + max(tokens),
        )  # fmt: skip
        ((defined.out * dout[0]).sum() + defined.loss).backward()
        assert x.grad is not None
        assert_close("out", values["out"][0], defined.out, torch.float32)
        assert_close("dx", values["dx"][0], x.grad, torch.float32)
        assert values["dropped"] == defined.is_dropped[SINKS:].sum()
        assert (values["dropped"] > 0) == (config.capacity is not None)
    for name, weight in weights.items():
        shards = [values[f"d{name}"] for values, _ in results]
        if is_expert(whole.get_parameter(name)):
            # Ranks with the same experts sum up; those of an ep group stand side by side.
            shards = [torch.stack(shards[place::ep]).sum(0) for place in range(ep)]
            total = torch.cat(shards)
        else:
            total = torch.stack(shards).sum(0)
        assert_close(name, total, weight.grad, torch.float32)
    check_levels(levels, config)


def check_levels(levels: list[dict[str, Any]], config: MoEConfig) -> None:
    """Fail unless recomputation changes no number, and only a whole layer sends again."""
    recomputed = []
    for rank in levels:
        expected, entries = rank["none"]
        for level, (values, entries_here) in rank.items():
            for name, value in expected.items():
                if name != "recomputed":
                    assert torch.equal(values[name], value), f"{level}: {name}"
            if level == "above":
                recomputed.append(values["recomputed"].item())
            for name, entry in entries_here.items():
                passes = 1.5 if level == "layer" and name != "counts" else 1
                passes = 2 if level == "layer" and name == "counts" else passes
                assert entry[0] == passes * entries[name][0], f"{level}: {name}"
        assert ("counts" in entries) == (config.capacity is None)
    assert max(recomputed) > 0


def measure_kept(world: World, config: MoEConfig, recompute: Recompute) -> tuple[int, int]:
    """Return the bytes that a forward pass leaves behind, and the rows that arrived here."""
    mesh = init_mesh(world, torch.device("cpu"), "gloo", TIMEOUT_SECONDS, ep=world.world_size)
    dist.barrier()
    bounds = torch.tensor([0, 256], dtype=torch.int32)
    context = SequenceContext(build_layout(bounds), OpsConfig(), Comm(mesh, Ledger()))
    part = ModelPart(ep_rank=mesh.ep.index, ep_size=mesh.ep.size)
    layer = build_moe(config, size=64, part=part, recompute=recompute)
    arrived = []
    layer.experts.register_forward_pre_hook(lambda _, args: arrived.append(len(args[0])))
    x = torch.randn(1, 256, 64, requires_grad=True)
    layer(x, context)
    return saved_bytes(lambda: layer(x, context), layer) - x.nbytes, arrived[0]


@pytest.mark.parametrize("config", [DROPLESS, ALIGNED], ids=["dropless", "aligned"])
def test_recomputed_experts_keep_rows_that_arrived_and_rows_that_came_back(
    config: MoEConfig,
) -> None:
    for kept, arrived in run_ranks(2, measure_kept, config, Recompute(moe="experts")):
        rows = (arrived + 2 * 256) * 64 * 4
        # Beside them, where each row goes, on both ways.
        assert rows <= kept <= rows + 8 * (3 * arrived + 6 * 256)


def test_aligned_experts_send_even_parts() -> None:
    results = run_ranks(2, compute, 2, ALIGNED)
    rows = -(-8 * (SINKS + TOKENS // 2 + 1) * 2 // (8 * 10))  # 0.8 x rows x top 2 / 8 experts
    for rank in results:
        _, entries = rank["none"]
        # Forward and backward, for the other rank's four experts.
        assert entries == dict.fromkeys(("dispatch", "combine"), (2, 2 * 4 * rows * E * 4))
