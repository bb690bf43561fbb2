"""Which format a model is written in, and why others cannot hold it; SpikingBrain's own layout."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.foreign import imported_logits, model_logits
from helpers.models import build_model, compose_config, tiny_model_config
from safetensors.torch import save_file

from conf.schema import ModelConfig
from models.io import plan_export, read_foreign
from models.io.compare import differences
from models.io.read import parameter_shapes, read_config
from models.io.transformers_config import write_config

REFUSED = {
    "spiking": ("full", None, "it spikes"),
    "linear": ("linear full", None, "layers 0: mixer=LinearAttention, not SoftmaxAttention"),
    "parallel": ("full linear+full", None, r"layers 1: mixer=LinearAttention \+ SoftmaxAtt"),
    "windows": ("window full window", None, "as llama, layers 0, 2: window_size=5, not None"),
    "sinks": ("full", "num_sinks=2", "num_sinks=2, not 0"),
    "no-rotary": ("full", "mixers.full.rope_theta=null", "rope_theta=None, not 10000"),
    "heads": ("window full", "mixers.full.num_kv_heads=4", "num_kv_heads=4, not 2"),
    "bias-and-norm": ("full", "mixers.full.qkv_bias=true", "qkv_bias=True, not False"),
}
"""Layers, a change and the reason, by name."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_family_expresses_is_refused_with_the_reasons(case: str) -> None:
    layers, change, message = REFUSED[case]
    overrides = ["model.mixers.full.qk_norm=true"] if case == "bias-and-norm" else []
    overrides += [f"model.{change}"] if change else []
    config = tiny_model_config(*layers.split(), overrides=overrides)
    is_spiking = case == "spiking"
    with pytest.raises(ValueError, match=f"format=huggingface: .*{message}.*format=longaxon can"):
        plan_export(config, "huggingface", is_spiking=is_spiking, seq_len=64)
    plan = plan_export(config, "auto", is_spiking=is_spiking, seq_len=64)
    assert (plan.format, plan.values, len(plan.reasons)) == ("longaxon", None, 2)
    assert all(ours == theirs for ours, theirs in plan.names.items())


def test_experts_are_refused_in_both_formats() -> None:
    config = compose_config("model=spikingbrain_76b").model
    for name in ("huggingface", "gla_swa"):
        with pytest.raises(ValueError, match=r"ffn=mixture of experts, not dense") as error:
            plan_export(config, name, is_spiking=False, seq_len=64)  # type: ignore[arg-type]
        assert "num_sinks=128, not 0" in str(error.value)


def spikingbrain(*overrides: str) -> ModelConfig:
    """Return a tiny model of SpikingBrain-7B's pattern, four query heads on two states."""
    bias = [f"model.mixers.{name}.qkv_bias=true" for name in ("linear", "window")]
    rank = ["model.mixers.linear.gate_rank=16", "model.tie_embeddings=false"]
    layers = ("linear", "window", "linear")
    return tiny_model_config(*layers, overrides=[*bias, *rank, *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mixers.linear.gate_rank=8", "layers 0, 2: gate_rank=8, not 16"),
        ("model.mixers.linear.feature_map=none", "layers 0, 2: feature_map=none, not relu"),
        ("model.mixers.window.qkv_bias=false", "layers 1: qkv_bias=False, not True"),
        ("model.mixers.window.window_size=null", "layers 1: window_size=None, not 4096"),
        ("model.hidden_size=40", "head_dim=8, not 10"),
    ],
)
def test_gla_swa_is_refused_where_the_published_code_computes_something_else(
    override: str, message: str
) -> None:
    config = spikingbrain(override)
    with pytest.raises(ValueError, match=f"format=gla_swa: .*{message}"):
        plan_export(config, "gla_swa", is_spiking=False, seq_len=64)


def write_gla_swa(folder: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Write a random model as it was published; return it, and its tensors by published names."""
    config = spikingbrain()
    model = build_model(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    plan = plan_export(config, "auto", is_spiking=True, seq_len=64)
    assert (plan.format, len(plan.reasons)) == ("gla_swa", 1)
    tensors = {plan.names[n]: p.detach().clone() for n, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(plan.values))
    return model, tensors


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def published_logits(w: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Compute gla_swa token by token, in float64, from tensors by their published names.

    Args:
        tokens: [T], of a model with 4 query heads on 2 key heads of 8 channels and a window of 5.

    Returns:
        [T, vocab] logits.
    """
    w = {name: tensor.double() for name, tensor in w.items()}
    x = w["model.embeddings.weight"][tokens]
    length = len(tokens)
    angle = torch.arange(length)[:, None] * 1e4 ** -(torch.arange(4).double() / 4)
    for i in range(3):
        p = f"model.layers.{i}."
        h = rms(x, w[p + "attn_norm.weight"])
        q, k, v = (
            F.linear(h, w[f"{p}attn.{n}_proj.weight"], w[f"{p}attn.{n}_proj.bias"])
            .view(length, -1, 8).transpose(0, 1) for n in "qkv"
        )  # fmt: skip
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        if p + "attn.gk_proj.0.weight" in w:
            low = F.linear(h, w[p + "attn.gk_proj.0.weight"])
            gate = F.linear(low, w[p + "attn.gk_proj.1.weight"], w[p + "attn.gk_proj.1.bias"])
            g = (F.logsigmoid(gate) / 16).exp().view(length, 2, 8).transpose(0, 1)
            g, q, k = g.repeat_interleave(2, 0), q.relu() * 8**-0.5, k.relu()
            state, outs = torch.zeros(4, 8, 8).double(), []
            for t in range(length):
                state = g[:, t, :, None] * state + k[:, t, :, None] * v[:, t, None, :]
                outs.append(torch.einsum("hk,hkv->hv", q[:, t], state))
            out = rms(torch.stack(outs), w[p + "attn.g_norm.weight"])
        else:
            q, k = (
                torch.cat([
                    a[..., :4] * angle.cos() - a[..., 4:] * angle.sin(),
                    a[..., 4:] * angle.cos() + a[..., :4] * angle.sin(),
                ], -1) for a in (q, k)
            )  # fmt: skip
            distance = torch.arange(length)[:, None] - torch.arange(length)
            hidden = (distance < 0) | (distance >= 5)
            score = (q @ k.transpose(1, 2) * 8**-0.5).masked_fill(hidden, -torch.inf)
            out = (score.softmax(-1) @ v).transpose(0, 1)
        x = x + F.linear(out.flatten(1), w[p + "attn.o_proj.weight"])
        h = rms(x, w[p + "mlp_norm.weight"])
        gate, up = (F.linear(h, w[f"{p}mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        x = x + F.linear(F.silu(gate) * up, w[p + "mlp.down_proj.weight"])
    return F.linear(rms(x, w["model.norm.weight"]), w["lm_head.weight"])


def test_gla_swa_means_what_was_published_both_ways(tmp_path: Path) -> None:
    model, tensors = write_gla_swa(tmp_path)
    tokens = torch.randint(40, (1, 30))
    expected = published_logits(tensors, tokens[0]).float()
    assert float(expected.std()) > 0.1
    for logits in (model_logits(model, tokens), imported_logits(tmp_path, tokens)):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not differences(read_foreign(str(tmp_path)).config, spikingbrain())


def test_gla_swa_tensors_and_keys_are_checked(tmp_path: Path) -> None:
    _, tensors = write_gla_swa(tmp_path)
    names = ("model.layers.0.attn.g_norm.weight", "model.layers.1.attn.k_proj.bias")
    save_file(
        {n: t for n, t in tensors.items() if n not in names}
        | {"model.layers.1.attn.g_norm.weight": torch.ones(8)},
        tmp_path / "model.safetensors",
    )
    listed = f"unknown: model.layers.1.attn.g_norm.weight; missing: {', '.join(names)}"
    with pytest.raises(ValueError, match=re.escape(listed)):
        read_foreign(str(tmp_path))
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"use_short_conv": True, "gate_logit_normalizer": 8}
    message = r"use_short_conv=True \(False is read\); gate_logit_normalizer=8 \(16 is read\)"
    with pytest.raises(ValueError, match=message):
        read_config(values)
    del values["attn_layers"], values["norm_eps"]
    with pytest.raises(ValueError, match="lacks attn_layers, norm_eps"):
        read_config(values)


LAYER = {
    "attn_norm.weight": (3584,), "mlp_norm.weight": (3584,),
    "attn.q_proj.weight": (3584, 3584), "attn.q_proj.bias": (3584,),
    "attn.k_proj.weight": (512, 3584), "attn.k_proj.bias": (512,),
    "attn.v_proj.weight": (512, 3584), "attn.v_proj.bias": (512,),
    "attn.o_proj.weight": (3584, 3584),
    "mlp.gate_proj.weight": (18944, 3584), "mlp.up_proj.weight": (18944, 3584),
    "mlp.down_proj.weight": (3584, 18944),
}  # fmt: skip
LINEAR_LAYER = {
    "attn.gk_proj.0.weight": (16, 3584), "attn.gk_proj.1.weight": (512, 16),
    "attn.gk_proj.1.bias": (512,), "attn.g_norm.weight": (128,),
}  # fmt: skip
TOP = {
    "model.embeddings.weight": (152064, 3584), "model.norm.weight": (3584,),
    "lm_head.weight": (152064, 3584),
}  # fmt: skip
CONFIG = {
    "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "hidden_act": "swish",
    "sliding_window": 4096, "attn_layers": list(range(1, 28, 2)), "attn_mode": "chunk",
    "use_short_conv": False, "conv_size": 4, "rope_theta": 1e6, "max_position_embeddings": 131072,
    "norm_eps": 1e-6, "elementwise_affine": True, "tie_word_embeddings": False,
    "bos_token_id": 151643, "eos_token_id": 151643, "model_type": "gla_swa",
    "architectures": ["GLAswaForCausalLM"],
}  # fmt: skip


def test_spikingbrain_7b_has_the_published_names_shapes_and_keys() -> None:
    config = compose_config("model=spikingbrain_7b").model
    qwen = write_config(compose_config("model=qwen2_5_7b").model, 131072)
    base = qwen | {"bos_token_id": 151643, "eos_token_id": 151643}
    plan = plan_export(config, "auto", is_spiking=False, seq_len=131072, source=base)
    expected = dict(TOP)
    for i in range(28):
        parts = LAYER if i % 2 else LAYER | LINEAR_LAYER
        expected |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
    shapes = parameter_shapes(config)
    assert {plan.names[name]: tuple(shape) for name, shape in shapes.items()} == expected
    assert plan.values == CONFIG
    assert read_config(CONFIG)[0] == config
