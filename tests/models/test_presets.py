"""Every model and experiment in conf/ composes, validates and builds; the published ones exactly.

Published shapes: section 4 of arXiv:2509.05276 for SpikingBrain-7B, the config.json of the others.
"""

from pathlib import Path

import pytest
import torch
from helpers.models import OPS, compose_config

import conf
from conf.schema import ModelConfig, SpikeConfig
from models.causal_lm import CausalLM, Layer, layer_list
from models.mixers.linear_attention import LinearAttentionConfig
from models.mixers.softmax_attention import SoftmaxAttentionConfig
from models.moe import MoE
from parallel.expert import is_expert
from parallel.pipeline import ModelPart, cut_layers
from trainer.flops import FlopCounter

CONF = Path(str(conf.__file__)).parent
MODELS = sorted(file.stem for file in (CONF / "model").glob("*.yaml"))
MIXTURES = sorted(file.stem for file in (CONF / "moe").glob("*.yaml"))
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))

QWEN2_5_7B = 7_615_616_512
LOW_RANK_GATE = 3584 * 16 + 16 * 512 + 512
"""W1: 3584 -> 16, W2: 16 -> 4 x 128 with its bias."""
PARAMETERS = {
    "smollm2_135m": 134_515_008,
    "qwen2_5_7b": QWEN2_5_7B,
    # q, k, v, o, FFNs, norms, embedding and head are those of the base; each of the 14 linear
    # layers adds its gate and a norm of one head's 128 channels: 926,464 together.
    "spikingbrain_7b": QWEN2_5_7B + 14 * (LOW_RANK_GATE + 128),
    # Every branch has q, k, v and o of its own. If both shared those of the base, there would be
    # 28 * BRANCH less, 76,055,942,144 in all and 11,894,887,424 active.
    "spikingbrain_76b": 76_878_154_752,
}
ACTIVE_76B = 12_717_100_032
"""What one token passes through: all but 15 of the 16 routed experts; 12,172,102,656 of it without
the embedding, of which a token reads one row."""
E, FFN = 3584, 3 * 3584 * 18944
BRANCH = 2 * E * E + 2 * E * 512 + E + 2 * 512
"""q, k, v, o and biases of the first three: 28 heads of 128 channels, 4 of keys and values."""


def build_on_meta(config: ModelConfig) -> CausalLM:
    """Build a model whose weights take no memory."""
    with torch.device("meta"):
        return CausalLM(config, SpikeConfig(enabled=True, k=3.0), OPS)


def count(model: CausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def layers(model: CausalLM) -> list[Layer]:
    return [layer for _, layer in model.named_layers()]


@pytest.fixture(scope="module")
def spikingbrain_76b() -> CausalLM:
    return build_on_meta(compose_config("model=spikingbrain_76b").model)


@pytest.mark.parametrize("name", MODELS)
def test_model_presets_compose_and_build(name: str) -> None:
    config = compose_config(f"model={name}").model
    model = build_on_meta(config)
    assert len(model.layers) == config.num_layers
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(set(layer.mixers) <= config.mixers.keys() for layer in layer_list(config))
    assert count(model) == PARAMETERS.get(name, count(model))


@pytest.mark.parametrize("name", MIXTURES)
def test_kinds_of_mixtures_build_in_a_model(name: str) -> None:
    config = compose_config("model=tiny_moe", f"moe@model.ffns.moe.moe={name}").model
    *_, last = layers(build_on_meta(config))
    assert isinstance(last.ffn, MoE)
    assert last.ffn.config == config.ffns["moe"].moe
    assert (last.ffn.config.top_k == 2) == (name == "top2_bias")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_compose_and_build(name: str) -> None:
    given = ("run.init_from=base", "data.path=text") if name == "spikingbrain_7b" else ()
    config = compose_config(f"experiment={name}", *given)
    assert len(build_on_meta(config.model).layers) == config.model.num_layers
    assert config.run.name == name


def test_presets_with_published_sizes_exist() -> None:
    assert set(MODELS) >= {"tiny", *PARAMETERS}
    assert "quickstart" in EXPERIMENTS


@pytest.mark.parametrize(
    ("name", "published", "rel"),
    [
        ("smollm2_135m", 134.5e6, 0.001),
        ("qwen2_5_7b", 7.62e9, 0.001),
        # Given to two digits.
        ("spikingbrain_7b", 7.6e9, 0.005),
        ("spikingbrain_76b", 76e9, 0.012),
    ],
)
def test_parameters_agree_with_the_published_figure(
    name: str, published: float, rel: float
) -> None:
    assert pytest.approx(published, rel=rel) == PARAMETERS[name]


def test_spikingbrain_7b_alternates_linear_and_window_layers() -> None:
    config = compose_config("model=spikingbrain_7b").model
    kinds = [layer.mixer.kind for layer in layers(build_on_meta(config))]
    assert kinds == 14 * ["linear_attention", "window_attention"]
    linear, window = config.mixers["linear"], config.mixers["window"]
    assert linear == LinearAttentionConfig(
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        gate_rank=16,
        gate_normalizer=16.0,
        feature_map="relu",
        qkv_bias=True,
    )
    assert window == SoftmaxAttentionConfig(
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        window_size=4096,
        rope_theta=1e6,
        qkv_bias=True,
    )
    assert config.norm_eps == 1e-6
    assert config.num_sinks == 0


QWEN_ATTENTION = {
    "q_proj.weight": (3584, 3584),
    "q_proj.bias": (3584,),
    "k_proj.weight": (512, 3584),
    "k_proj.bias": (512,),
    "v_proj.weight": (512, 3584),
    "v_proj.bias": (512,),
    "o_proj.weight": (3584, 3584),
}
"""Projections of Qwen2.5-7B, from which both models come."""


def test_spikingbrain_7b_has_the_published_tensors() -> None:
    model = build_on_meta(compose_config("model=spikingbrain_7b").model)
    gate = {
        "gk_proj.0.weight": (16, 3584),
        "gk_proj.1.weight": (512, 16),
        "gk_proj.1.bias": (512,),
        "g_norm.weight": (128,),
    }
    linear, window = layers(model)[:2]
    assert shapes(linear.mixer.branches["linear"]) == QWEN_ATTENTION | gate
    assert shapes(window.mixer.branches["window"]) == QWEN_ATTENTION
    assert not shapes(linear.mixer.norms)
    assert shapes(linear.ffn) == {
        "gate_proj.weight": (18944, 3584),
        "up_proj.weight": (18944, 3584),
        "down_proj.weight": (3584, 18944),
    }
    assert linear.mixer_norm.weight.shape == linear.ffn_norm.weight.shape == (3584,)
    assert model.norm.weight.shape == (3584,)
    assert model.embed.weight.shape == model.head.weight.shape == (152064, 3584)
    assert model.head.weight is not model.embed.weight


def test_smollm2_135m_has_the_published_tensors() -> None:
    model = build_on_meta(compose_config("model=smollm2_135m").model)
    assert shapes(layers(model)[29].mixer.branches["full"]) == {
        "q_proj.weight": (576, 576),
        "k_proj.weight": (192, 576),
        "v_proj.weight": (192, 576),
        "o_proj.weight": (576, 576),
    }
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.shape == (49152, 576)


def test_spikingbrain_76b_has_76_9_billion_parameters_of_which_12_7_are_active(
    spikingbrain_76b: CausalLM,
) -> None:
    model = spikingbrain_76b
    ends = 2 * 152064 * E + E + 128 * E  # embedding, head, last norm and sinks
    mixing = 2 * BRANCH + 128 + 4 * E  # norms: of a head, of both branches, of both halves
    experts = 17 * FFN + 16 * E  # with the router
    assert count(model) == ends + 28 * mixing + 7 * FFN + 21 * experts == 76_878_154_752
    idle = sum(
        layer.ffn.experts.get_parameter(name)[1:].numel()
        for layer in layers(model)
        if isinstance(layer.ffn, MoE)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    assert idle == 21 * 15 * FFN
    assert count(model) - idle == ACTIVE_76B
    assert pytest.approx(12e9, rel=0.015) == ACTIVE_76B - model.embed.weight.numel()


@pytest.mark.parametrize(
    ("name", "full", "dense", "experts", "sinks"),
    [
        ("spikingbrain_76b", {7, 14, 21, 28}, {1, 2, 3, 5, 7, 9, 11}, 16, 128),
        ("tiny_moe", {4}, {1}, 8, 8),
    ],
)
def test_intra_layer_hybrids_have_one_structure(
    name: str, full: set[int], dense: set[int], experts: int, sinks: int
) -> None:
    config = compose_config(f"model={name}").model
    for number, layer in enumerate(layer_list(config), start=1):
        assert layer.mixers == ["linear", "full" if number in full else "window"]
        assert layer.ffn == ("dense" if number in dense else "moe")
    linear, window, full_attention = (config.mixers[n] for n in ("linear", "window", "full"))
    assert (linear.gate, linear.feature_map, linear.gate_rank) == ("key", "sigmoid", None)
    assert window.window_size
    assert full_attention.window_size is None
    assert window.rope_theta == full_attention.rope_theta
    for mixer in config.mixers.values():
        assert mixer.qkv_bias
        shape = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
        assert shape == (linear.num_heads, linear.num_kv_heads, linear.head_dim)
    moe = config.ffns["moe"].moe
    assert moe is not None
    assert config.ffns["dense"].moe is None
    assert (moe.num_experts, moe.top_k, moe.num_shared_experts) == (experts, 1, 1)
    assert (moe.score, moe.capacity, config.num_sinks) == ("softmax", None, sinks)
    model = build_on_meta(config)
    for layer in layers(model):
        assert set(layer.mixer.norms) == set(layer.mixer.branches)


def test_spikingbrain_76b_has_the_published_tensors(spikingbrain_76b: CausalLM) -> None:
    model, config = spikingbrain_76b, spikingbrain_76b.config
    dense, mixture = layers(model)[6], layers(model)[13]
    assert shapes(dense.mixer.branches["full"]) == QWEN_ATTENTION
    assert shapes(mixture.mixer.branches["linear"]) == QWEN_ATTENTION | {"g_norm.weight": (128,)}
    assert shapes(dense.mixer.norms) == {"linear.weight": (3584,), "full.weight": (3584,)}
    up, down = (18944, 3584), (3584, 18944)
    ffn = {"gate_proj.weight": up, "up_proj.weight": up, "down_proj.weight": down}
    assert shapes(dense.ffn) == ffn
    assert shapes(mixture.ffn) == {
        "router.weight": (16, 3584),
        "experts.gate_proj": (16, *up),
        "experts.up_proj": (16, *up),
        "experts.down_proj": (16, *down),
        **{f"shared.{name}": shape for name, shape in ffn.items()},
    }
    assert model.sinks.weight.shape == (128, 3584)
    assert model.head.weight is not model.embed.weight
    window, full = config.mixers["window"], config.mixers["full"]
    assert (window.window_size, window.rope_theta, full.rope_theta) == (4096, 1e6, 1e6)
    assert config.norm_eps == 1e-6


@pytest.mark.parametrize(
    ("seq_len", "gflops", "costliest"),
    [(8192, 25.715, 1.069), (32768, 26.683, 1.066), (131072, 29.568, 1.060)],
)
def test_spikingbrain_76b_is_cut_into_even_stages(
    spikingbrain_76b: CausalLM, seq_len: int, gflops: float, costliest: float
) -> None:
    costs, head = FlopCounter(spikingbrain_76b).layer_costs(seq_len)
    # Per token: the weights it is multiplied by, without biases, norms, sinks and embedding; 4 H D
    # for each visible key, sinks included; state writes and reads of the linear branch.
    weights = 28 * 2 * (BRANCH - E - 1024) + 7 * FFN + 21 * (2 * FFN + 16 * E) + 152064 * E
    in_window = 4096 - 4096 * 4095 / 2 / seq_len
    keys = 24 * (in_window + 128) + 4 * ((seq_len + 1) / 2 + 128)
    per_token = 2 * weights + 4 * E * keys + 28 * 2 * 128**2 * (4 + 28)
    assert (sum(costs) + head) / seq_len == pytest.approx(per_token, rel=1e-9)
    assert per_token / 1e9 == pytest.approx(gflops, abs=1e-3)
    stages = cut_layers(costs, 4, head=head)
    assert stages == [range(9), range(9, 16), range(16, 23), range(23, 28)]
    sums = [sum(costs[i] for i in stage) + head * (stage.stop == 28) for stage in stages]
    # Of the mean; a mixture layer is 0.15 of it.
    assert max(sums) * 4 / sum(sums) == pytest.approx(costliest, abs=1e-3)
    assert min(sums) * 4 / sum(sums) > 0.93


def test_parts_of_spikingbrain_76b_are_the_whole() -> None:
    config = compose_config("model=spikingbrain_76b").model
    total = 0
    for stage in (range(9), range(9, 16), range(16, 23), range(23, 28)):
        part = ModelPart(stage, stage.start == 0, stage.stop == 28, ep_rank=7, ep_size=8)
        with torch.device("meta"):
            model = CausalLM(config, SpikeConfig(enabled=False, k=3.0), OPS, part=part)
        held = sum(p.numel() * (8 if is_expert(p) else 1) for p in model.parameters())
        assert held > 76e9 / 6
        total += held
    assert total == PARAMETERS["spikingbrain_76b"]
