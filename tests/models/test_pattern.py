"""Patterns over the layers of a Transformer, and the weights that its mixers get."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers.assertions import assert_close
from helpers.models import (
    OPS,
    build_model,
    compose_config,
    compose_tree,
    one_rank_context,
    random_batch,
    tiny_model_config,
)

from conf.schema import ConvertConfig, ModelConfig, PatternConfig, SpikeConfig, build
from models.causal_lm import CausalLM, layer_list, seeded
from models.convert import Recipe, Upcycling, plan_conversion
from models.convert_mixers import (
    MEASURED_TOKENS,
    Remapping,
    Scale,
    measure_scales,
    needs_scales,
)
from models.mixers.linear_attention import LinearAttentionConfig
from models.pattern import remap

F32 = torch.float32
BIASED = ("model.mixers.full.qkv_bias=true", "++model.mixers.full.qk_norm=true")
HEDGEHOG = "pattern/linear@pattern.mixers.linear=hedgehog"
EXPERTS = "moe@pattern.moe=top1_shared"


def make_pattern(*overrides: str) -> PatternConfig:
    """Compose the pattern of the command with these overrides."""
    tree = compose_tree("source=s", "out=o", *overrides, config_name="convert")
    return build(ConvertConfig, tree).pattern


def transformer(num_layers: int = 2) -> ModelConfig:
    return tiny_model_config(*num_layers * ["full"], overrides=BIASED)


def on_meta(config: ModelConfig) -> CausalLM:
    with torch.device("meta"):
        return CausalLM(config, SpikeConfig(enabled=False, k=3.0), OPS)


def tensors(model: CausalLM) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def plan(
    old: ModelConfig, new: ModelConfig, seed: int = 3, scales: dict[str, Scale] | None = None
) -> dict[str, Recipe]:
    conversions = [Upcycling(1e-3, seed), Remapping(0.1, seed, scales or {})]
    return plan_conversion(on_meta(old), on_meta(new), conversions, changes_settings=True)


def convert(old: CausalLM, *overrides: str, seed: int = 3) -> tuple[CausalLM, dict[str, Recipe]]:
    """Return the model that a pattern makes of another, and where its tensors come from."""
    config = remap(old.config, make_pattern(*overrides))
    recipes, given, new = plan(old.config, config, seed), tensors(old), build_model(config, seed=7)
    wanted = tensors(new)
    assert recipes.keys() == wanted.keys()
    with torch.no_grad():
        for name, recipe in recipes.items():
            made = recipe.make(*(given[source] for source in recipe.sources))
            wanted[name].copy_(made)
    return new.eval(), recipes


def randomise(model: CausalLM) -> CausalLM:
    """Give norms and biases values that are theirs alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def rows(config: ModelConfig) -> list[str]:
    return ["+".join(layer.mixers) for layer in layer_list(config)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["pattern=keep"], 6 * ["full"]),
        (["pattern=inter_layer"], 3 * ["linear", "window"]),
        (
            ["pattern=inter_layer", "pattern.keep_full=[2,5]"],
            ["linear", "window", "full", "window", "linear", "full"],
        ),
        (
            ["pattern=inter_layer", "pattern.layers=[[linear],[linear],[source]]"],
            2 * ["linear", "linear", "full"],
        ),
        (
            ["pattern=intra_layer", "pattern.keep_full=[5]"],
            [*5 * ["linear+window"], "linear+full"],
        ),
    ],
)  # fmt: skip
def test_layers_follow_the_pattern(overrides: list[str], expected: list[str]) -> None:
    config = remap(transformer(6), make_pattern(*overrides))
    assert rows(config) == expected
    assert config.mixers.keys() >= {name for row in expected for name in row.split("+")}
    # The shortest list that says so.
    assert len(config.layers) == next(
        n for n in (1, 2, 3, 6) if expected == expected[:n] * (6 // n)
    )


def test_mixers_have_the_shape_of_the_source() -> None:
    old = transformer()
    config = remap(old, make_pattern("pattern=inter_layer", "pattern.window_size=7", HEDGEHOG))
    full = old.mixers["full"]
    assert config.mixers["window"] == dataclasses.replace(full, window_size=7)
    assert config.mixers["linear"] == LinearAttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        gate_rank=16,
        gate_normalizer=1.0,
        half_life=[0.25, 4096.0],
        feature_map="hedgehog",
        qkv_bias=True,
        qk_norm=True,
        normalize="sum",
        output_gate="swish",
        output_gate_rank=64,
    )
    rotated = make_pattern("pattern=inter_layer", "pattern.mixers.linear.rope_theta=source")
    assert remap(old, rotated).mixers["linear"].rope_theta == full.rope_theta == 1e6


@pytest.mark.parametrize(
    ("source", "preset", "overrides", "new"),
    [
        ("qwen2_5_7b", "spikingbrain_7b", ["pattern=inter_layer"], 926_464),
        (
            "qwen2_5_7b",
            "spikingbrain_76b",
            [
                "pattern=intra_layer", "pattern.keep_full=[6,13,20,27]", "pattern.num_sinks=128",
                EXPERTS, "pattern.keep_dense=[0,1,2,4,6,8,10]",
            ],
            # 21 routers, a norm of a head in each layer and two of a branch, sinks.
            21 * 16 * 3584 + 28 * (128 + 2 * 3584) + 128 * 3584,
        ),
    ],
)  # fmt: skip
def test_published_models_are_planned_from_their_base(
    source: str, preset: str, overrides: list[str], new: int
) -> None:
    old = compose_config(f"model={source}").model
    config = remap(old, make_pattern(*overrides))
    expected = on_meta(compose_config(f"model={preset}").model)
    base, remapped = on_meta(old), on_meta(config)
    assert {n: t.shape for n, t in tensors(expected).items()} == {
        name: tensor.shape for name, tensor in tensors(remapped).items()
    }
    conversions = [Upcycling(1e-3, 3), Remapping(old.init_std, 3)]
    recipes = plan_conversion(base, remapped, conversions, changes_settings=True)
    parameters = {name: p.numel() for name, p in expected.named_parameters()}
    by_origin = {
        origin: sum(n for name, n in parameters.items() if recipes[name].origin == origin)
        for origin in ("copied", "transformed", "new")
    }
    assert by_origin["new"] == new
    assert new / sum(parameters.values()) < 2e-4
    # A preset instead of a pattern gives the same tensors, from the same ones.
    again = plan_conversion(base, expected, conversions)
    assert {n: (r.sources, r.origin) for n, r in again.items()} == {
        name: (recipe.sources, recipe.origin) for name, recipe in recipes.items()
    }


def test_every_branch_has_the_projections_of_the_attention() -> None:
    old = randomise(build_model(transformer()))
    new, recipes = convert(old, "pattern=intra_layer", "pattern.keep_full=[1]")
    given, made = tensors(old), tensors(new)
    for layer, branches in (("0", "linear window"), ("1", "linear full")):
        for branch in branches.split():
            for key, tensor in old.layers[layer].mixer.branches["full"].named_parameters():
                name = f"layers.{layer}.mixer.branches.{branch}.{key}"
                assert torch.equal(made[name], tensor), name
                assert recipes[name].origin == "copied"
    new_names = {name for name, recipe in recipes.items() if recipe.origin == "new"}
    assert new_names == {
        f"layers.{layer}.mixer.{key}.weight"
        for layer, other in (("0", "window"), ("1", "full"))
        for key in ("branches.linear.g_norm", "norms.linear", f"norms.{other}")
    }
    others = given.keys() & made.keys()
    assert {"embed.weight", "norm.weight", "layers.0.ffn.up_proj.weight"} <= others
    assert all(torch.equal(made[name], given[name]) for name in others)


@torch.no_grad()
def test_a_window_that_holds_everything_changes_nothing() -> None:
    old = randomise(build_model(transformer()))
    new, _ = convert(
        old, "pattern=inter_layer", "pattern.layers=[[window]]", "pattern.window_size=20"
    )
    batch, context = random_batch([20], 40), one_rank_context([20])
    assert torch.equal(new.hidden(batch.tokens, context), old.hidden(batch.tokens, context))


@torch.no_grad()
def test_new_tensors_begin_as_documented() -> None:
    old = randomise(build_model(transformer()))
    gates = ("gate_rank=4", "output_gate_rank=3")
    gates = [f"pattern.mixers.linear.{gate}" for gate in gates]
    pattern = ("pattern=inter_layer", "pattern.layers=[[linear]]", HEDGEHOG, "pattern.num_sinks=5")
    new, recipes = convert(old, *pattern, *gates)
    for name in ("layers.0", "layers.1"):
        mixer = new.get_submodule(f"{name}.mixer.branches.linear")
        assert torch.equal(mixer.q_features.proj.weight, torch.eye(8).expand(4, 8, 8))
        assert torch.equal(mixer.k_features.proj.weight, torch.eye(8).expand(2, 8, 8))
        for gate in (mixer.gk_proj, mixer.g_proj):
            assert not gate[1].weight.any()
            assert gate[0].weight.std().item() == pytest.approx(0.1, rel=0.3)
        _, _, _, log_decay = mixer._project(torch.randn(1, 3, 32), None)
        half_lives = torch.logspace(-2, 12, 16, base=2.0).expand(1, 3, 2, 16)
        assert_close("half lives", -math.log(2) / log_decay, half_lives, F32)
        assert torch.nn.functional.silu(mixer.g_proj[1].bias).mean().item() == pytest.approx(1.0)
    assert recipes["sinks.weight"].origin == "new"
    assert new.sinks is not None
    assert new.sinks.weight.std().item() == pytest.approx(old.embed.weight.std().item(), rel=0.2)
    # By the seed and the name, not by what was drawn before.
    name = "layers.{}.mixer.branches.linear.g_proj.0.weight"
    first, second = (new.get_parameter(name.format(i)) for i in "01")
    assert not torch.equal(first, second)
    alone, _ = convert(old, *pattern[:3], "pattern.keep_full=[0]", *gates)
    assert torch.equal(alone.get_parameter(name.format(1)), second)
    other, _ = convert(old, *pattern, *gates, seed=4)
    assert not torch.equal(other.get_parameter(name.format(1)), second)


@torch.no_grad()
def test_norms_begin_with_the_scale_of_the_attention() -> None:
    old = randomise(build_model(transformer(3)))
    expected = scales_of(old)
    found = measure_scales(old.config, OPS, tensors(old).__getitem__, seed=3)
    assert found.keys() == expected.keys()
    for name, (heads, out) in expected.items():
        assert (found[name].heads, found[name].out) == pytest.approx((heads, out), rel=1e-5)
        assert heads != pytest.approx(out, rel=0.1)
    remapped = remap(old.config, make_pattern("pattern=intra_layer", "pattern.keep_full=[1]"))
    recipes = plan(old.config, remapped, scales=found)
    assert needs_scales(recipes)
    for name, other in (("layers.0", "window"), ("layers.1", "full")):
        for key, wanted in (
            ("branches.linear.g_norm", found[name].heads),
            ("norms.linear", 0.1 * found[name].out),
            (f"norms.{other}", found[name].out),
        ):
            weight = recipes[f"{name}.mixer.{key}.weight"].make()
            assert_close(key, weight, torch.full_like(weight, wanted), F32)
    hedgehog = remap(
        old.config,
        make_pattern(
            "pattern=inter_layer", HEDGEHOG, "pattern.keep_full=[2]", "pattern.layers=[[linear]]"
        ),
    )
    assert not needs_scales(plan(old.config, hedgehog))


def scales_of(model: CausalLM) -> dict[str, tuple[float, float]]:
    """Return the root mean squares of what o_proj reads and writes, over the tokens of seed 3."""
    seen = {}

    def see(name: str) -> Any:
        def hook(_: Any, args: Any, out: torch.Tensor) -> None:
            seen[name] = tuple(x.square().mean().sqrt().item() for x in (args[0], out))

        return hook

    for name, layer in model.named_layers():
        layer.mixer.branches["full"].o_proj.register_forward_hook(see(name))
    with seeded(3, "scales"):
        tokens = torch.randint(40, (1, MEASURED_TOKENS))
    model.hidden(tokens, one_rank_context([MEASURED_TOKENS]))
    return seen


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["pattern.keep_full=[1,6]"],
            r"keep_full names \[6\]; the model has layers 0 to 5",
        ),
        (["pattern.keep_dense=[9]", EXPERTS], r"pattern.keep_dense names \[9\]"),
        (
            ["pattern.layers=[[linear],[linear],[linear],[window]]"],
            "has 4 entries, which do not fit 6 layers",
        ),
        (["pattern.layers=[[lin],[window]]"], "'lin', which is not in pattern.mixers; there are"),
        (["pattern.mixers.linear.gate=key"], "pattern.mixers.linear: gate=key takes no"),
        (["+pattern.mixers.linear.windw=3"], "pattern.mixers.linear.windw: Unexpected keyword"),
        (
            ["+pattern.mixers.full=${pattern.mixers.window}", "pattern.layers=[[full],[source]]"],
            "a mixer 'full' as the attention that other layers keep",
        ),
    ],
)
def test_patterns_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remap(transformer(6), make_pattern("pattern=inter_layer", *overrides))


@pytest.mark.parametrize("layers", [("full", "window"), ("linear", "linear"), ("full+window",)])
def test_a_source_that_is_no_transformer_is_refused(layers: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="a pattern takes one softmax attention, the same in"):
        remap(tiny_model_config(*layers), make_pattern("pattern=inter_layer"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 5.0}, "mixers.window.rope_theta: 5.0 was 1000000.0"),
        ({"num_kv_heads": 1}, r"branches.window.k_proj.weight would be \[16, 32\], not \[8, 32\]"),
        ({"qk_norm": False}, "unexpected: layers.0.mixer.branches.full.q_norm.weight"),
        ({"qkv_bias": False}, "unexpected: layers.1.mixer.branches.full.v_proj.bias"),
    ],
)
def test_a_given_model_keeps_what_is_no_pattern(changes: dict[str, Any], message: str) -> None:
    old = transformer()
    new = remap(old, make_pattern("pattern=inter_layer", "pattern.layers=[[window]]"))
    window = dataclasses.replace(new.mixers["window"], **changes)
    new = dataclasses.replace(new, mixers={"window": window})
    with pytest.raises(ValueError, match=message):
        plan_conversion(on_meta(old), on_meta(new), [Remapping(0.1, 0)])
