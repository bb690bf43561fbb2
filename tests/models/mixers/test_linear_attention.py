"""The GLA mixer against its formulas (eq. 10 and 11 of arXiv:2509.05276), written out."""

import dataclasses
from typing import Any

import pytest
import torch
from helpers.assertions import assert_close
from helpers.models import OPS, build_model, one_rank_context, tiny_model_config

from conf.schema import SpikeConfig
from models.mixers.linear_attention import LinearAttention, LinearAttentionConfig
from models.spiking import spike_encoders
from ops.spike import spike_count
from trainer.flops import FlopCounter

CONFIG = LinearAttentionConfig(
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    gate_rank=4,
    gate_normalizer=16.0,
    feature_map="relu",
    qkv_bias=True,
)
KEY_GATED = dataclasses.replace(
    CONFIG, gate="key", gate_rank=None, gate_normalizer=None, feature_map="sigmoid"
)
FEATURE_MAPS = {
    "relu": lambda x: x.clamp(min=0),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "none": lambda x: x,
}
SATURATED = (-60.0, -9.0, -3.0, 0.0, 3.0, 9.0, 20.0, 60.0)
"""Keys before their feature map, one per channel; sigmoid is 1 in float32 from 17 on."""


def make_mixer(config: LinearAttentionConfig, *, spiking: bool = False) -> LinearAttention:
    """Build a mixer of 32 channels with random biases and norm."""
    mixer = config.build(32, 1e-6, SpikeConfig(enabled=spiking, k=3.0), OPS)
    mixer.reset(0.3, 0.3)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.uniform_(-1, 1)
    return mixer


def by_formula(
    config: LinearAttentionConfig, w: dict[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """Mix one document x [T, E] token by token with the parameters w, in float64."""
    feature_map = FEATURE_MAPS[config.feature_map]
    state = torch.zeros(2, 8, 8, dtype=torch.float64)
    outs = []
    for token in x:
        q = (w["q_proj.weight"] @ token + w["q_proj.bias"]).view(6, 8)
        k = (w["k_proj.weight"] @ token + w["k_proj.bias"]).view(2, 8)
        v = (w["v_proj.weight"] @ token + w["v_proj.bias"]).view(2, 8)
        if config.gate == "key":
            gate = 1 / (1 + k.exp())
        else:
            low_rank = w["gk_proj.1.weight"] @ (w["gk_proj.0.weight"] @ token)
            gate = (low_rank + w["gk_proj.1.bias"]).sigmoid() ** (1 / 16.0)
        q, k = feature_map(q), feature_map(k)
        state = gate.view(2, 8, 1) * state + k[:, :, None] * v[:, None, :]
        heads = torch.stack([q[h] @ state[h // 3] for h in range(6)]) * 8**-0.5
        rms = (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        outs.append(w["o_proj.weight"] @ (heads / rms * w["g_norm.weight"]).flatten())
    return torch.stack(outs)


def mix_both_ways(
    mixer: LinearAttention, lengths: list[int], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the output and every gradient of packed documents, from the mixer and by formula."""
    x = torch.randn(1, sum(lengths), 32).to(dtype)
    dout = torch.randn(1, sum(lengths), 32).to(dtype)
    parameters = dict(mixer.named_parameters())
    exact = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    exact_x = x.double().requires_grad_()
    documents = exact_x[0].split(lengths)
    wanted = torch.cat([by_formula(mixer.config, exact, doc) for doc in documents])[None]
    out = mixer(x.requires_grad_(), one_rank_context(lengths))
    results = []
    for y, dy, leaves in (
        (out, dout, parameters | {"x": x}),
        (wanted, dout.double(), exact | {"x": exact_x}),
    ):
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        results.append({"out": y} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)})
    return results[0], results[1]


@pytest.mark.parametrize(
    "changes",
    [{}, {"feature_map": "none"}, {"feature_map": "sigmoid"}, dataclasses.asdict(KEY_GATED)],
    ids=["low_rank-relu", "low_rank-none", "low_rank-sigmoid", "key-sigmoid"],
)
def test_mixer_follows_its_formulas(changes: dict[str, Any]) -> None:
    mixer = make_mixer(dataclasses.replace(CONFIG, **changes))
    found, wanted = mix_both_ways(mixer, [70, 10], torch.float32)
    for name, expected in wanted.items():
        assert expected.any(), name
        assert_close(name, found[name], expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_key_gate_is_exact_where_keys_saturate(dtype: torch.dtype) -> None:
    mixer = make_mixer(KEY_GATED)
    z = torch.tensor(2 * SATURATED)
    with torch.no_grad():
        mixer.k_proj.weight.zero_()
        mixer.k_proj.bias.copy_(z)  # type: ignore[union-attr]
        for parameter in mixer.parameters():
            parameter.copy_(parameter.bfloat16())
    _, k, _, log_decay = mixer._project(torch.randn(1, 1, 32, dtype=dtype))
    assert log_decay.dtype == torch.float32
    for name, found, wanted, rounding in (
        ("log_decay", log_decay, -z.double().exp().log1p(), torch.float32),
        ("k", k, 1 / (1 + (-z.double()).exp()), dtype),
    ):
        ratio = found.double().flatten() / wanted
        assert_close(name, ratio, torch.ones(16, dtype=torch.float64), rounding)
    found, expected = mix_both_ways(mixer, [40, 1, 7], dtype)
    for name, wanted in expected.items():
        assert_close(name, found[name], wanted, dtype)
    # Beside large ones a lost small gradient would not show.
    for value in (-9.0, 3.0, 9.0):
        name, rows = "dk_proj.bias", z == value
        assert_close(f"{name} at {value}", found[name][rows], expected[name][rows], torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("spiking", [False, True])
def test_decoding_continues_a_prompt(spiking: bool) -> None:
    mixer = make_mixer(KEY_GATED, spiking=spiking).eval()
    x = torch.randn(1, 24, 32)
    expected = mixer(x, one_rank_context([24]))
    for prompt in (0, 17):
        cache = mixer.new_cache()
        if prompt:
            mixer(x[:, :prompt], one_rank_context([prompt]), cache)
        outs = [mixer.decode(x[:, t : t + 1], cache, t) for t in range(prompt, 24)]
        assert_close(f"after {prompt}", torch.cat(outs, 1), expected[:, prompt:], torch.float32)


def test_key_gate_takes_what_the_spiking_projection_gives() -> None:
    mixer, plain = make_mixer(KEY_GATED, spiking=True), make_mixer(KEY_GATED)
    plain.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 20, 32)
    count, threshold = spike_count(x, 3.0)
    for name, found, expected in zip(
        ("q", "k", "v", "log_decay"),
        mixer._project(x),
        plain._project(count * threshold),
        strict=True,
    ):
        assert_close(name, found, expected, torch.float32)
    mixer(x, one_rank_context([20]))
    histograms = {name: e.take_histogram() for name, e in spike_encoders(mixer).items()}
    # The first pass counted in encode_in too; a gate of its own would have an encoder.
    assert {n: int(h.sum()) for n, h in histograms.items()} == {
        "encode_in": 2 * 20 * 32,
        "encode_out": 20 * 48,
    }


def test_key_gate_adds_neither_parameters_nor_flops() -> None:
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    config = tiny_model_config(
        "key",
        overrides=[
            "+mixer@model.mixers.key=key_gated_linear_attention",
            *(f"model.mixers.key.{name}={value}" for name, value in shape.items()),
        ],
    )
    assert config.mixers["key"] == dataclasses.replace(
        KEY_GATED, num_heads=4, num_kv_heads=2, qkv_bias=False
    )
    mixer = config.mixers["key"].build(32, 1e-6, SpikeConfig(enabled=True, k=3.0), OPS)
    assert {name for name, _ in mixer.named_parameters()} == {
        f"{name}_proj.weight" for name in "qkvo"
    } | {"g_norm.weight"}
    weights, state = 32 * (4 + 2 * 2 + 4) * 8, 2 * 8 * 8 * (2 + 4)
    flops = FlopCounter(build_model(config)).training([7, 20])
    assert flops["linear_attention"] == 3 * 27 * (2 * weights + state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 4}, "num_kv_heads=4 must divide num_heads=6; num_kv_heads=1 and 6 do"),
        ({"gate_rank": None}, r"given \(None, 16.0\); 16 and 16.0 would do"),
        ({"gate_normalizer": None}, r"given \(4, None\); 16 and 16.0 would do"),
        ({"gate": "key", "feature_map": "sigmoid"}, r"given \(4, 16.0\); set both to null"),
        (
            {"gate": "key", "gate_rank": None, "gate_normalizer": None},
            "not feature_map=relu; feature_map=sigmoid would do",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
