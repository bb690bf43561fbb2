"""Upcycling against what a mixture of scaled copies is, exactly, and against its bound; plans of
conversions that do not fit are refused by name.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.assertions import assert_close
from helpers.models import OPS, build_model, compose_config, tiny_model_config

from conf.schema import ModelConfig, SpikeConfig
from models.causal_lm import CausalLM
from models.convert import Upcycling, plan_conversion, upcycling_scale
from models.layers import SwiGLU
from models.moe import MoE

PUBLISHED = "num_experts=16"
KINDS = {
    PUBLISHED: 1 / 16,
    "num_experts=8 top_k=2": 2 / 8,
    "num_experts=8 top_k=4 normalize=true num_shared_experts=2": 1.0,
    "num_experts=8 top_k=3 score=sigmoid bias_rate=0.1": 3 / 2,
    "num_experts=4 top_k=4 num_shared_experts=0": 1.0,
}
"""Mixtures, each with what the weights of a token's experts sum to if all logits are 0."""

for_all_kinds = pytest.mark.parametrize(("kind", "share"), KINDS.items(), ids=KINDS)


def dense_config(*overrides: str) -> ModelConfig:
    """Return a model of two layers of 32 channels and FFNs of width 48."""
    return tiny_model_config("linear", "window", overrides=["model.num_sinks=3", *overrides])


def mixed_config(kind: str, *overrides: str) -> ModelConfig:
    """Return the same model with mixtures for FFNs."""
    rows = "{mixers:[linear],ffn:moe},{mixers:[window],ffn:moe}"
    group = ("+moe@model.ffns.moe.moe=top1_shared", "+model.ffns.moe.intermediate_size=48")
    settings = (f"model.ffns.moe.moe.{setting}" for setting in kind.split())
    return dense_config(*group, *settings, f"model.layers=[{rows}]", *overrides)


def on_meta(config: ModelConfig) -> CausalLM:
    with torch.device("meta"):
        return CausalLM(config, SpikeConfig(enabled=False, k=3.0), OPS)


def tensors(model: CausalLM) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def convert(old: CausalLM, config: ModelConfig, router_std: float, seed: int = 3) -> CausalLM:
    """Return a model made by the recipes of `plan_conversion`."""
    conversions = [Upcycling(router_std, seed)]
    recipes = plan_conversion(on_meta(old.config), on_meta(config), conversions)
    given, new = tensors(old), build_model(config, seed=7)
    wanted = tensors(new)
    assert recipes.keys() == wanted.keys()
    with torch.no_grad():
        for name, recipe in recipes.items():
            wanted[name].copy_(recipe.make(*(given[source] for source in recipe.sources)))
    return new.eval()


def upcycled(kind: str, router_std: float) -> tuple[SwiGLU, MoE]:
    """Return a dense FFN, its gates large enough to bend, and the mixture made of it."""
    dense = build_model(dense_config())
    ffn = dense.layers["0"].ffn
    assert isinstance(ffn, SwiGLU)
    ffn.reset(0.5, 0.2)
    mixture = convert(dense, mixed_config(kind), router_std).layers["0"].ffn
    assert isinstance(mixture, MoE)
    return ffn, mixture


def ratio(mixture: MoE, share: float, x: torch.Tensor) -> torch.Tensor:
    """Return (S + P) / (S + share), [N, 1]."""
    shared, routed = mixture.config.num_shared_experts, mixture.router(x)[0].sum(1, keepdim=True)
    return (shared + routed) / (shared + share)


@for_all_kinds
@torch.no_grad()
def test_mixture_is_the_dense_ffn_with_its_gate_scaled(kind: str, share: float) -> None:
    ffn, mixture = upcycled(kind, 0.3)
    x = torch.randn(64, 32)
    gate, up = ffn.gate_proj(x), ffn.up_proj(x)
    scaled = ffn.down_proj(gate * (upcycling_scale(mixture.config) * gate).sigmoid() * up)
    assert_close("y", mixture(x), ratio(mixture, share, x) * scaled, torch.float32)


@pytest.mark.parametrize("router_std", [1e-3, 0.3])
@for_all_kinds
@torch.no_grad()
def test_deviation_is_within_its_bound(kind: str, share: float, router_std: float) -> None:
    ffn, mixture = upcycled(kind, router_std)
    x = torch.randn(64, 32)
    z = torch.linspace(0, 10, 100_001, dtype=torch.float64)
    steepest = (z**2 * z.sigmoid() * (-z).sigmoid()).max().item()
    assert steepest == pytest.approx(0.4393, abs=1e-4)
    bend = steepest * abs(1 / upcycling_scale(mixture.config) - 1)
    out, factor = ffn(x), ratio(mixture, share, x)
    by_gate = factor * bend * (ffn.up_proj(x).abs() @ ffn.down_proj.weight.abs().T)
    bound = (factor - 1).abs() * out.abs() + by_gate
    deviation = (mixture(x) - out).abs()
    assert (deviation <= bound + 1e-5 * out.abs().max()).all()
    # It is of the order of what it bounds, unless nothing deviates but for rounding.
    assert deviation.norm() > 0.02 * bound.norm() or bound.norm() < 1e-4 * out.norm()


@pytest.mark.parametrize("kind", list(KINDS)[:2])
@torch.no_grad()
def test_a_small_router_keeps_to_its_share(kind: str) -> None:
    _, mixture = upcycled(kind, 0.05)
    x = torch.randn(64, 32)
    largest = F.linear(x, mixture.router.weight).abs().amax(1)
    off = (mixture.router(x)[0].sum(1) / KINDS[kind] - 1).abs()
    assert off.max() > 0.1
    assert (off <= (2 * largest).expm1()).all()


@for_all_kinds
@torch.no_grad()
def test_with_a_homogeneous_gate_and_an_even_router_nothing_changes(
    kind: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("models.layers", "models.moe"):
        monkeypatch.setattr(f"{module}.swiglu", lambda gate, up, *, impl: gate.relu() * up)
    ffn, mixture = upcycled(kind, 0.1)
    mixture.router.weight.zero_()
    x = torch.randn(64, 32)
    assert_close("y", mixture(x), ffn(x), torch.float32)


def test_published_scale() -> None:
    scale = upcycling_scale(mixed_config(PUBLISHED).ffns["moe"].moe)
    assert scale == pytest.approx(0.98, abs=5e-4)
    assert scale**3 == pytest.approx(16 / 17)


def test_all_else_is_copied_and_routers_differ_by_layer_and_seed() -> None:
    dense = build_model(dense_config())
    new = convert(dense, mixed_config(PUBLISHED), 0.01)
    old, made = tensors(dense), tensors(new)
    assert {name for name in made if name not in old} == {n for n in made if ".ffn." in n}
    for name in old.keys() & made.keys():
        assert torch.equal(made[name], old[name]), name
    first, second = (new.layers[name].ffn.router for name in "01")
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert first.load.tolist() == pytest.approx([1 / 16] * 16)
    assert first.bias.tolist() == [0] * 16
    assert not torch.equal(first.weight, second.weight)
    for seed, same in [(3, True), (4, False)]:
        again = convert(dense, mixed_config(PUBLISHED), 0.01, seed).layers["0"].ffn.router
        assert torch.equal(again.weight, first.weight) == same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.ffns.moe.intermediate_size=24", r"gate_proj would be \[16, 48, 32\], not \[16, 24"),
        ("model.tie_embeddings=false", "missing: head.weight"),
        ("model.num_layers=1", "unexpected: layers.1.mixer_norm.weight"),
        ("model.num_layers=3", "missing: layers.2.mixer_norm.weight"),
        ("model.vocab_size=44", r"shape: embed.weight would be \[40, 32\], not \[44, 32\]"),
        ("model.norm_eps=1e-5", "norm_eps: 1e-05 was 1e-06"),
        ("model.mixers.window.window_size=7", "mixers.window.window_size: 7 was 5"),
    ],
)
def test_what_does_not_match_is_refused_by_name(change: str, message: str) -> None:
    old, new = on_meta(dense_config()), on_meta(mixed_config(PUBLISHED, change))
    with pytest.raises(ValueError, match=message):
        plan_conversion(old, new, [Upcycling(0.01, 0)])


@pytest.mark.parametrize(
    "message", ["missing: layers.1.ffn.gate_proj.weight", "unexpected: layers.1.ffn.router.weight"]
)
def test_a_mixture_does_not_become_dense(message: str) -> None:
    old, new = on_meta(mixed_config(PUBLISHED)), on_meta(dense_config())
    with pytest.raises(ValueError, match=message):
        plan_conversion(old, new, [Upcycling(0.01, 0)])


def test_a_mixture_stays_a_mixture() -> None:
    config = mixed_config(PUBLISHED)
    old = build_model(config)
    new = tensors(convert(old, config, 0.01))
    assert all(torch.equal(new[name], tensor) for name, tensor in tensors(old).items())


def test_76b_is_planned_from_a_dense_model_of_its_shape() -> None:
    rows = ",".join(
        6 * ["{mixers:[linear,window],ffn:dense}"] + ["{mixers:[linear,full],ffn:dense}"]
    )
    preset = "model=spikingbrain_76b"
    new = on_meta(compose_config(preset).model)
    old = on_meta(compose_config(preset, f"model.layers=[{rows}]").model)
    recipes = plan_conversion(old, new, [Upcycling(1e-3, 0)])
    assert recipes.keys() == tensors(new).keys()
    assert sum(recipe.copies == 16 for recipe in recipes.values()) == 21 * 3
