"""The GLA mixer against its formulas (eq. 10 and 11 of arXiv:2509.05276), written out."""

import dataclasses
from typing import Literal

import pytest
import torch
from helpers.assertions import assert_close
from helpers.models import OPS, one_rank_context

from conf.schema import SpikeConfig
from models.mixers.linear_attention import LinearAttention, LinearAttentionConfig

CONFIG = LinearAttentionConfig(
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    gate_rank=4,
    gate_normalizer=16.0,
    feature_map="relu",
    qkv_bias=True,
)


def make_mixer(config: LinearAttentionConfig) -> LinearAttention:
    """Build a mixer of 32 channels with random biases and norm."""
    mixer = config.build(32, 1e-6, SpikeConfig(enabled=False, k=3.0), OPS)
    mixer.reset(0.3, 0.3)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.uniform_(-1, 1)
    return mixer


def by_formula(mixer: LinearAttention, x: torch.Tensor) -> torch.Tensor:
    """Mix one document x [T, E] token by token, in float64."""
    w = {name: p.detach().double() for name, p in mixer.named_parameters()}
    relu = mixer.config.feature_map == "relu"
    state = torch.zeros(2, 8, 8, dtype=torch.float64)
    outs = []
    for token in x.double():
        q = (w["q_proj.weight"] @ token + w["q_proj.bias"]).view(6, 8)
        k = (w["k_proj.weight"] @ token + w["k_proj.bias"]).view(2, 8)
        v = (w["v_proj.weight"] @ token + w["v_proj.bias"]).view(2, 8)
        if relu:
            q, k = q.clamp(min=0), k.clamp(min=0)
        low_rank = w["gk_proj.1.weight"] @ (w["gk_proj.0.weight"] @ token)
        gate = (low_rank + w["gk_proj.1.bias"]).sigmoid() ** (1 / 16.0)
        state = gate.view(2, 8, 1) * state + k[:, :, None] * v[:, None, :]
        heads = torch.stack([q[h] @ state[h // 3] for h in range(6)]) * 8**-0.5
        rms = (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        outs.append(w["o_proj.weight"] @ (heads / rms * w["g_norm.weight"]).flatten())
    return torch.stack(outs)


@torch.no_grad()
@pytest.mark.parametrize("feature_map", ["relu", "none"])
def test_mixer_follows_its_formulas(feature_map: Literal["relu", "none"]) -> None:
    mixer = make_mixer(dataclasses.replace(CONFIG, feature_map=feature_map))
    x = torch.randn(1, 80, 32)
    expected = torch.cat([by_formula(mixer, x[0, :70]), by_formula(mixer, x[0, 70:])])
    assert_close("out", mixer(x, one_rank_context([70, 10]))[0], expected, torch.float32)


def test_state_heads_must_divide_the_query_heads() -> None:
    with pytest.raises(
        ValueError, match="num_kv_heads=4 must divide num_heads=6; num_kv_heads=1 and 6 do"
    ):
        dataclasses.replace(CONFIG, num_kv_heads=4)
