"""Mixture-of-experts layers against their definition, and what routers remember."""

import dataclasses
from typing import Any

import pytest
import torch
from helpers.assertions import assert_close
from helpers.models import build_model, one_rank_context, random_batch
from helpers.moe import E, G, build_moe, define_moe, moe_config, tiny_moe_config

from conf.schema import MoEConfig
from models.moe import MoE, Routing
from parallel.recompute import Recompute
from trainer.statistics import RouterStatistics

SINKS, TOKENS, LOSS_SCALE = 5, 36, 0.7
LOSSES = {"balance_loss": 0.3, "z_loss": 0.02}
LOAD = torch.arange(1.0, G + 1) / (G * (G + 1) / 2)
BIAS = torch.tensor([0.3, -0.2, 0.0, 0.1, -0.4, 0.2])


def make_tokens(num_tokens: int = SINKS + TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and the gradient of what comes of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, num_tokens, E, generator=generator)
    return x, torch.randn(1, num_tokens, E, generator=generator)


def differentiate(
    layer: MoE, x: torch.Tensor, dout: torch.Tensor, num_sinks: int = SINKS
) -> dict[str, torch.Tensor]:
    """Return what the layer computes and every gradient."""
    context = one_rank_context((x.shape[1] - num_sinks,))
    context = dataclasses.replace(context, num_sinks=num_sinks, aux_loss_scale=LOSS_SCALE)
    x = x.detach().requires_grad_()
    out = layer(x, context)
    out.backward(dout)
    assert x.grad is not None
    results = {"out": out.detach(), "dx": x.grad}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        results[f"d{name}"] = parameter.grad
    layer.zero_grad()
    return results


def define(layer: MoE, x: torch.Tensor, dout: torch.Tensor, **options: Any) -> dict[str, Any]:
    """Return the same by the definition, and the definition itself."""
    x = x[0].double().requires_grad_()
    weights = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    load, bias = layer.router.load.double(), layer.router.bias.double()
    defined = define_moe(
        weights, x, layer.config, load=load, bias=bias if layer.config.bias_rate else None,
        num_sinks=SINKS, loss_scale=LOSS_SCALE, **options,
    )  # fmt: skip
    ((defined.out * dout[0]).sum() + defined.loss).backward()
    assert x.grad is not None
    results: dict[str, Any] = {"out": defined.out[None], "dx": x.grad[None], "defined": defined}
    return results | {f"d{name}": weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("fields", "spiking"),
    [
        ({"num_shared_experts": 0}, False),
        ({"top_k": 2, "normalize": True, "bias_rate": 0.1} | LOSSES, True),
        ({"top_k": 3, "num_shared_experts": 2} | LOSSES, False),
        ({"score": "sigmoid", "num_shared_experts": 2, "bias_rate": 0.1, "z_loss": 0.1}, True),
        ({"score": "sigmoid", "top_k": 2, "num_shared_experts": 0, "balance_loss": 0.3}, False),
        ({"score": "sigmoid", "top_k": 3, "normalize": True, "bias_rate": 0.1} | LOSSES, False),
        ({"spiking_router": True, "top_k": 2, "num_shared_experts": 0} | LOSSES, True),
        ({"capacity": 0.7, "top_k": 2} | LOSSES, False),
        ({"capacity": 1.3, "top_k": 3, "score": "sigmoid", "num_shared_experts": 0}, True),
        ({"capacity": 0.05, "top_k": 2}, False),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_layer_is_its_definition(fields: dict[str, Any], spiking: bool) -> None:
    layer = build_moe(moe_config(**fields), spiking=spiking)
    layer.router.load.copy_(LOAD)
    layer.router.bias.copy_(BIAS)
    x, dout = make_tokens()
    expected = define(layer, x, dout, spiking=spiking)
    defined = expected.pop("defined")
    actual = differentiate(layer, x, dout)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(name, actual[name], value, torch.float32)
    # What the router saw; sinks are no tokens.
    routing, scores = layer.router.take_routing(), defined.scores.detach()[SINKS:]
    z = defined.logits.detach()[SINKS:].logsumexp(1).square().sum()
    assert torch.equal(
        routing.load, defined.experts[SINKS:].flatten().bincount(minlength=G).double()
    )
    assert_close("score", routing.score, scores.sum(0), torch.float32)
    assert_close("entropy", routing.entropy, -(scores * scores.log()).sum(), torch.float32)
    assert_close("z", routing.z, z, torch.float32)
    assert (routing.tokens, routing.recomputed) == (TOKENS, 0)
    assert routing.dropped == defined.is_dropped[SINKS:].sum()
    assert defined.is_dropped[:SINKS].any() or layer.config.capacity != 0.05
    assert (layer.config.capacity is None) == (routing.dropped == 0)


def test_capacity_that_drops_nothing_is_no_capacity() -> None:
    x, dout = make_tokens()
    config = moe_config(top_k=2, **LOSSES)
    plain = differentiate(build_moe(config), x, dout)
    layer = build_moe(dataclasses.replace(config, capacity=float(G)))
    for name, value in differentiate(layer, x, dout).items():
        assert_close(name, value, plain[name], torch.float32)
    assert layer.router.take_routing().dropped == 0


def test_every_expert_computes_equally_many_rows_and_dropped_tokens_get_the_rest() -> None:
    config = moe_config(capacity=0.5, num_shared_experts=1)
    layer = build_moe(config)
    seen = []
    layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1].tolist()))
    x, dout = make_tokens(48)
    send_all_to(layer, 2)
    actual = differentiate(layer, x, dout, num_sinks=0)
    assert seen == [[4] * G]  # 0.5 x 48 tokens / 6 experts
    assert layer.shared is not None
    shared = layer.shared(x)
    changed = (actual["out"] - shared).abs().amax(-1)[0] > 1e-4
    assert changed.tolist() == [True] * 4 + [False] * 44  # first come, first served
    assert layer.router.take_routing().dropped == 44


def send_all_to(layer: MoE, expert: int) -> None:
    """Let every token choose one expert: all logits are 0, and a bias decides."""
    with torch.no_grad():
        layer.router.weight.zero_()
    layer.router.bias.zero_()
    layer.router.bias[expert] = 1
    layer.router.config = layer.config = dataclasses.replace(layer.config, bias_rate=0.1)


@pytest.mark.parametrize("recompute", [Recompute(), Recompute(above=10)], ids=["kept", "adaptive"])
def test_experts_without_tokens_have_gradients_of_zero(recompute: Recompute) -> None:
    layer = build_moe(moe_config(num_shared_experts=0), recompute=recompute)
    send_all_to(layer, 4)
    x, dout = make_tokens()
    actual = differentiate(layer, x, dout)
    for name in ("gate", "up", "down"):
        per_expert = actual[f"dexperts.{name}_proj"].flatten(1).abs().amax(1)
        assert per_expert[4] > 0
        assert (per_expert[[0, 1, 2, 3, 5]] == 0).all()


def test_balance_loss_pulls_scores_from_loaded_experts() -> None:
    # d/dlogit_i of c G sum_j p_j f_j is c G p_i (f_i - sum_j p_j f_j).
    layer = build_moe(moe_config(balance_loss=0.3))
    layer.router.load.copy_(LOAD)
    x, dout = make_tokens()
    differentiate(layer, x, torch.zeros_like(dout))  # nothing but the auxiliary loss
    actual = differentiate(layer, x, torch.zeros_like(dout))["drouter.weight"]
    tokens = x[0, SINKS:].double()
    p = (tokens @ layer.router.weight.double().T).softmax(1).detach()
    load = layer.router.load.double()
    dlogits = LOSS_SCALE * 0.3 * G * p * (load - (p * load).sum(1, keepdim=True))
    assert_close("drouter.weight", actual, dlogits.T @ tokens, torch.float32)


def test_bias_moves_against_the_load() -> None:
    router = build_moe(moe_config(bias_rate=0.25)).router
    load = torch.tensor([4.0, 1.0, 3.0, 0.0, 2.0, 2.0])  # the mean is 2
    router.balance(load)
    assert router.bias.tolist() == [-0.25, 0.25, -0.25, 0.25, 0.0, 0.0]
    assert torch.equal(router.load, load / 12)
    router.balance(torch.zeros(G))  # a step without tokens divides by nothing
    assert router.load.tolist() == [0.0] * G
    layer = build_moe(moe_config(bias_rate=0.05, num_shared_experts=0))
    x, dout = make_tokens()
    loads = []
    for _ in range(40):
        differentiate(layer, x, dout)
        loads.append(layer.router.take_routing().load)
        layer.router.balance(loads[-1])
    assert loads[0].max() >= 1.5 * TOKENS / G
    assert torch.stack(loads[-10:]).mean(0).max() <= 1.2 * TOKENS / G


def test_routers_remember_their_load_but_start_afresh() -> None:
    router = build_moe(moe_config(bias_rate=0.25)).router
    router.balance(torch.arange(float(G)))
    other = build_moe(moe_config(bias_rate=0.25)).router
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.load, router.load)
    assert torch.equal(other.bias, router.bias)
    router.reset(0.1)
    assert router.load.tolist() == pytest.approx([1 / G] * G)
    assert not router.bias.any()


def test_statistics_add_up_over_passes_until_they_are_taken() -> None:
    layer = build_moe(moe_config(top_k=2, capacity=0.6))
    x, dout = make_tokens()
    differentiate(layer, x, dout)
    one = layer.router.take_routing().flatten()
    for _ in range(2):
        differentiate(layer, x, dout)
    routing = layer.router.take_routing()
    assert_close("routing", routing.flatten(), 2 * one, torch.float64)
    assert torch.equal(Routing.unflatten(routing.flatten()).load, routing.load)
    assert not layer.router.take_routing().flatten().any()


def test_evaluation_records_nothing_and_drops_nothing() -> None:
    x, _ = make_tokens()
    plain = build_moe(moe_config()).eval()
    layer = build_moe(moe_config(capacity=0.5, **LOSSES), recompute=Recompute(above=1)).eval()
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))
    assert layer.router.routing is None


LEVELS = [Recompute(moe="activation"), Recompute(moe="experts"), Recompute(above=6)]
LEVELS += [Recompute(moe="activation", above=6)]


@pytest.mark.parametrize(
    ("spiking", "dtype"),
    [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)],
    ids=["plain", "spiking", "bf16"],
)
@pytest.mark.parametrize("config", [moe_config(top_k=2, **LOSSES), moe_config(capacity=0.8)])
@pytest.mark.parametrize("recompute", LEVELS, ids=["activation", "experts", "above", "both"])
def test_recomputation_changes_no_number(
    recompute: Recompute, config: MoEConfig, spiking: bool, dtype: torch.dtype
) -> None:
    x, dout = (each.to(dtype) for each in make_tokens())
    plain = build_moe(config, spiking=spiking)
    expected = differentiate(plain, x, dout)
    layer = build_moe(config, spiking=spiking, recompute=recompute)
    for name, value in differentiate(layer, x, dout).items():
        assert torch.equal(value, expected[name]), name
    # And nothing is seen twice.
    routing, other = layer.router.take_routing(), plain.router.take_routing()
    other.recomputed = routing.recomputed
    assert torch.equal(routing.flatten(), other.flatten())
    if recompute.above is not None:
        assert routing.recomputed == 0 if config.capacity else routing.recomputed > 0


@pytest.mark.parametrize("capacity", ["null", "0.5"])
def test_decoding_goes_on_as_reading_would(capacity: str) -> None:
    moe = "model.ffns.moe.moe"
    config = tiny_moe_config(f"{moe}.capacity={capacity}", f"{moe}.top_k=2", "model.num_layers=4")
    model = build_model(config).eval()
    tokens = random_batch((12,), config.vocab_size).tokens
    with torch.no_grad():
        cache = model.new_cache()
        logits = [model.prefill(tokens[:, :7], one_rank_context((7,)), cache)]
        logits += [model.decode(tokens[:, t : t + 1], cache, t) for t in range(7, 12)]
        for length, actual in enumerate(logits, 7):
            context = one_rank_context((length,))
            expected = model.prefill(tokens[:, :length], context, model.new_cache())
            assert_close(f"logits after {length}", actual, expected, torch.float32)


def test_drop_rate_is_the_share_of_choices_that_found_no_place() -> None:
    moe = "model.ffns.moe.moe"
    overrides = (f"{moe}.capacity=0.5", f"{moe}.top_k=2", "model.num_sinks=0", "model.num_layers=3")
    model = build_model(tiny_moe_config(*overrides))
    batch = random_batch((40, 24), 40)
    model(batch.tokens, batch.labels, one_rank_context((40, 24)))
    statistics = RouterStatistics(model, model)
    routings = statistics.name(statistics.take())
    places = 8  # 0.5 x 64 tokens x 2 of 8 experts
    dropped = [float((r.load - places).clamp_min(0).sum()) for r in routings.values()]
    assert len(dropped) == 2
    assert min(dropped) > 0
    rate = statistics.metrics(routings)["router_drop_rate"]
    assert rate == pytest.approx(sum(dropped) / (2 * 64 * 2))
