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

CONF = Path(str(conf.__file__)).parent
MODELS = sorted(file.stem for file in (CONF / "model").glob("*.yaml"))
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
}


def build_on_meta(config: ModelConfig) -> CausalLM:
    """Build a model whose weights take no memory."""
    with torch.device("meta"):
        return CausalLM(config, SpikeConfig(enabled=True, k=3.0), OPS)


def count(model: CausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def layers(model: CausalLM) -> list[Layer]:
    return [layer for layer in model.layers if isinstance(layer, Layer)]


@pytest.mark.parametrize("name", MODELS)
def test_model_presets_compose_and_build(name: str) -> None:
    config = compose_config(f"model={name}").model
    model = build_on_meta(config)
    assert len(model.layers) == config.num_layers
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(set(layer.mixers) <= config.mixers.keys() for layer in layer_list(config))
    assert count(model) == PARAMETERS.get(name, count(model))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_compose_and_build(name: str) -> None:
    config = compose_config(f"experiment={name}")
    assert len(build_on_meta(config.model).layers) == config.model.num_layers
    assert config.run.name == name


def test_presets_with_published_sizes_exist() -> None:
    assert set(MODELS) >= {"tiny", *PARAMETERS}
    assert "quickstart" in EXPERIMENTS


@pytest.mark.parametrize(
    ("name", "published"),
    [("smollm2_135m", 134.5e6), ("qwen2_5_7b", 7.62e9), ("spikingbrain_7b", 7.6e9)],
)
def test_parameters_agree_with_the_published_figure(name: str, published: float) -> None:
    # 7.6B is given to two digits.
    rel = 0.005 if published == 7.6e9 else 0.001
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


def test_spikingbrain_7b_has_the_published_tensors() -> None:
    model = build_on_meta(compose_config("model=spikingbrain_7b").model)
    attention = {
        "q_proj.weight": (3584, 3584),
        "q_proj.bias": (3584,),
        "k_proj.weight": (512, 3584),
        "k_proj.bias": (512,),
        "v_proj.weight": (512, 3584),
        "v_proj.bias": (512,),
        "o_proj.weight": (3584, 3584),
    }
    gate = {
        "gk_proj.0.weight": (16, 3584),
        "gk_proj.1.weight": (512, 16),
        "gk_proj.1.bias": (512,),
        "g_norm.weight": (128,),
    }
    linear, window = layers(model)[:2]
    assert shapes(linear.mixer.branches["linear"]) == attention | gate
    assert shapes(window.mixer.branches["window"]) == attention
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
