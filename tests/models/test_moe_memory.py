"""What each level of recomputation takes off the memory of a mixture-of-experts layer.

M rows of routed experts and N tokens keep, of elements of b bytes: gate, up and their product,
(M + N S) I b each, for S shared experts; the router's float32 copy of the tokens, 4 N E, if b is
not 4; and copies of the weights in the compute dtype. What is left of the router is small.
"""

import dataclasses
import functools
from collections import Counter
from typing import Literal

import pytest
import torch
from helpers.models import OPS, one_rank_context, random_batch
from helpers.moe import G, build_moe, moe_config, tiny_moe_config

from conf.schema import SpikeConfig
from models.causal_lm import CausalLM
from models.moe import MoE, Routing
from parallel.recompute import Recompute, run_recomputed
from trainer.bench.memory import held_bytes

N, E, I = 512, 64, 160  # noqa: E741
ROUTER = 6 * 4 * N * (G + 1)
"""Most bytes that the router keeps besides its copy of the tokens: a few numbers per expert."""
INDICES = 8 * 4 * (G + 1)
"""Most bytes of what there is once per expert."""


def measure(
    recompute: Recompute,
    dtype: torch.dtype = torch.float32,
    *,
    top_k: int = 1,
    shared: int = 1,
    is_skewed: bool = False,
) -> tuple[int, Routing]:
    """Return the bytes that a forward pass leaves behind besides its output, and the routing.

    Args:
        is_skewed: let expert 2 have about half of the rows.
    """
    config = moe_config(top_k=top_k, num_shared_experts=shared, balance_loss=0.1, z_loss=0.1)
    layer = build_moe(config, size=E, intermediate_size=I, recompute=recompute.inside_moe)
    with torch.no_grad():
        layer.router.weight[2] *= 8 if is_skewed else 1
    context = dataclasses.replace(one_rank_context((N,)), aux_loss_scale=1.0)
    x = torch.randn(1, N, E, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()

    def forward() -> torch.Tensor:
        return run_recomputed(layer, x, context, when=recompute.has_ffn(is_moe=True))

    forward()
    routing = layer.router.take_routing()
    layer.router.routing = Routing.empty(G)  # which the pass that is measured adds to
    return held_bytes(forward) - x.nbytes, routing


@pytest.mark.parametrize(
    ("dtype", "top_k", "shared"),
    [(torch.float32, 1, 1), (torch.bfloat16, 1, 1), (torch.float32, 2, 0), (torch.bfloat16, 2, 2)],
    ids=str,
)
def test_levels_keep_less_and_less(dtype: torch.dtype, top_k: int, shared: int) -> None:
    kept = {
        level: measure(Recompute(moe=level), dtype, top_k=top_k, shared=shared)[0]
        for level in ("none", "activation", "experts", "layer")
    }
    b, is_half = dtype.itemsize, dtype != torch.float32
    rows = top_k * N
    one = (rows + shared * N) * I * b
    copy = 4 * N * E if is_half else 0
    weights = 3 * (G + shared) * I * E * b if is_half else 0
    saved = {level: kept["none"] - value for level, value in kept.items()}
    # The product; all three and copies of the weights; the rows before and after the experts too.
    for level, large in {
        "activation": one + copy,
        "experts": 3 * one + copy + weights,
        "layer": 3 * one + copy + weights + 2 * rows * E * b,
    }.items():
        assert large <= saved[level] <= large + ROUTER + 2 * INDICES + 16 * rows, level
    # Of the input alone, which was there before, nothing is left to keep.
    assert kept["layer"] <= INDICES


@pytest.mark.parametrize("level", ["none", "activation"])
def test_experts_with_many_rows_keep_nothing_else(level: Literal["none", "activation"]) -> None:
    plain, routing = measure(Recompute(moe=level), is_skewed=True)
    loads = routing.load.long().tolist()
    *_, second, first = sorted(loads)
    assert loads[2] == first > N // 4 > second
    # As many as the threshold is not many.
    for above, many in ((1, sum(n for n in loads if n > 1)), (second, first), (first, 0)):
        kept, routing = measure(Recompute(moe=level, above=above), is_skewed=True)
        assert routing.recomputed == many
        # Where the activation is recomputed anyway, gate and up are left to let go.
        saved = (2 if level == "activation" else 3) * many * I * 4
        assert plain - kept == pytest.approx(saved, abs=2 * INDICES), above


def test_a_model_recomputes_what_its_config_says_and_trains_alike() -> None:
    config = tiny_moe_config("model.ffns.moe.moe.capacity=0.9")
    batch, context = random_batch((200, 56), 40), one_rank_context((200, 56))
    context = dataclasses.replace(context, aux_loss_scale=1.0)
    kept, gradients, seen, calls = {}, {}, {}, Counter[Recompute]()
    for recompute in (
        Recompute(),
        Recompute(moe="activation"),
        Recompute(moe="experts", above=1),
        Recompute(above=1),
        Recompute(moe="layer", above=1),
        Recompute("selective"),
        Recompute("selective", "experts", 1),
        Recompute("full"),
        Recompute("full", "layer", 1),
    ):
        spike = SpikeConfig(enabled=False, k=3.0)
        model = CausalLM(config, spike, OPS, recompute=recompute)
        model.reset_parameters(0)

        moe = model.get_submodule("layers.1.ffn")
        assert isinstance(moe, MoE)
        count = functools.partial(calls.update, [recompute])
        handle = moe.experts.register_forward_pre_hook(lambda *_, count=count: count())

        def forward(model: CausalLM = model) -> torch.Tensor:
            return model(batch.tokens, batch.labels, context)[0]  # type: ignore[no-any-return]

        forward().backward()
        gradients[recompute] = {name: p.grad for name, p in model.named_parameters()}
        seen[recompute] = moe.router.take_routing()
        handle.remove()
        kept[recompute] = held_bytes(forward)
    plain = Recompute()
    for recompute, values in gradients.items():
        for name, value in values.items():
            assert value is not None
            assert torch.equal(value, gradients[plain][name]), f"{recompute}: {name}"  # type: ignore[arg-type]
        assert torch.equal(seen[recompute].flatten()[:-1], seen[plain].flatten()[:-1])
    levels = [Recompute(), Recompute(moe="activation"), Recompute(moe="experts", above=1)]
    levels += [Recompute(moe="layer", above=1), Recompute("selective"), Recompute("full")]
    sizes = [kept[level] for level in levels]
    assert sizes == sorted(set(sizes), reverse=True)
    # Inside of what runs again nothing runs a third time.
    twice = [level for level, count in calls.items() if count == 2]
    assert set(calls.values()) == {1, 2}
    assert twice == [r for r in calls if r.layers != "none" or r.moe in ("experts", "layer")]
    assert [r for r in seen if seen[r].recomputed] == [Recompute(above=1)]
