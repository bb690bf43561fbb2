"""The linear mixer against its formulas (eq. 10 and 11 of arXiv:2509.05276; hedgehog features of
arXiv:2402.04347), written out, in every choice of its config.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers.assertions import assert_close
from helpers.models import OPS, build_model, one_rank_context, tiny_model_config
from helpers.ranks import Setting, build_context, run_ranks

from conf.schema import RopeScaling, SpikeConfig
from models.layers import projection_weights
from models.mixers.linear_attention import LinearAttention, LinearAttentionConfig
from models.spiking import spike_encoders
from ops.spike import spike_count
from parallel.cost import SequenceCost
from parallel.mesh import World
from trainer.flops import FlopCounter

F32 = torch.float32
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
HEAD_GATED = dataclasses.replace(
    CONFIG, gate="head", gate_rank=None, gate_normalizer=2.0, half_life=[4.0, 64.0]
)
CHOICES = {
    "low_rank-relu": CONFIG,
    "low_rank-none": dataclasses.replace(CONFIG, feature_map="none", normalize="none"),
    "low_rank-sigmoid": dataclasses.replace(CONFIG, feature_map="sigmoid"),
    "key-sigmoid": KEY_GATED,
    # What a conversion has: the weights of softmax attention are learned, with their positions.
    "head-hedgehog-sum": dataclasses.replace(
        HEAD_GATED, feature_map="hedgehog", normalize="sum", rope_theta=100.0, qk_norm=True
    ),
    "low_rank-hedgehog-swish": dataclasses.replace(
        CONFIG, feature_map="hedgehog", output_gate="swish", output_gate_rank=5
    ),
    "none-elu-sum-sigmoid": dataclasses.replace(
        CONFIG, gate="none", gate_rank=None, gate_normalizer=None, feature_map="elu",
        normalize="sum", output_gate="sigmoid", qkv_bias=False,
    ),
    "key-rope-sum": dataclasses.replace(
        KEY_GATED, rope_theta=100.0, rope_scaling=RopeScaling(kind="linear", factor=2.0),
        normalize="sum",
    ),
    "low_rank-exp-sum": dataclasses.replace(
        CONFIG, feature_map="exp", normalize="sum", half_life=[8.0, 512.0]
    ),
}  # fmt: skip
"""Between them every value of every choice."""
FEATURE_MAPS = {
    "relu": lambda x: x.clamp(min=0),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "exp": lambda x: x.exp(),
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


def project(
    config: LinearAttentionConfig, w: dict[str, torch.Tensor], x: torch.Tensor, name: str, t: int
) -> torch.Tensor:
    """Return the queries or keys of a token, [H, D], before their feature map."""
    heads = (w[f"{name}_proj.weight"] @ x + w.get(f"{name}_proj.bias", 0)).view(-1, 8)
    if config.qk_norm:
        rms = (heads.square().mean(1, keepdim=True) + 1e-6).sqrt()
        heads = heads / rms * w[f"{name}_norm.weight"]
    if config.rope_theta is not None:
        factor = 1.0 if config.rope_scaling is None else config.rope_scaling.factor
        angle = t / factor * config.rope_theta ** (-torch.arange(4, dtype=torch.float64) / 4)
        pairs = torch.complex(heads[:, :4], heads[:, 4:]) * torch.polar(
            torch.ones_like(angle), angle
        )
        heads = torch.cat([pairs.real, pairs.imag], 1)
    return heads


def features(
    config: LinearAttentionConfig, w: dict[str, torch.Tensor], x: torch.Tensor, name: str
) -> torch.Tensor:
    if config.feature_map != "hedgehog":
        return FEATURE_MAPS[config.feature_map](x)
    weights = w[f"{name}_features.proj.weight"]
    logits = torch.stack([weights[h] @ x[h] for h in range(len(x))])
    exps = [logits.exp(), (-logits).exp()]
    return torch.cat([e / e.sum(1, keepdim=True) for e in exps], 1)


def keep(
    config: LinearAttentionConfig, w: dict[str, torch.Tensor], x: torch.Tensor, k: torch.Tensor
) -> torch.Tensor:
    """Return what a token with the keys k leaves of the state [2, D_k, D_v], which it fits."""
    if config.gate == "none":
        return torch.ones(2, 1, 1)
    if config.gate == "key":
        return (1 / (1 + k.exp()))[..., None]
    gate = w["gk_proj.0.weight"] @ x
    gate = w["gk_proj.1.weight"] @ gate if config.gate == "low_rank" else gate
    gate = gate + w[f"gk_proj.{int(config.gate == 'low_rank')}.bias"]
    return (gate.sigmoid() ** (1 / config.gate_normalizer)).view(2, -1, 1)


def by_formula(
    config: LinearAttentionConfig, w: dict[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """Mix one document x [T, E] token by token with the parameters w, in float64."""
    num_features = 16 if config.feature_map == "hedgehog" else 8
    state = torch.zeros(2, num_features, 8, dtype=torch.float64)
    total = torch.zeros(2, num_features, 1, dtype=torch.float64)
    outs = []
    for t, token in enumerate(x):
        q, k = (project(config, w, token, name, t) for name in "qk")
        v = (w["v_proj.weight"] @ token + w.get("v_proj.bias", 0)).view(2, 8)
        kept = keep(config, w, token, k)
        q, k = features(config, w, q, "q"), features(config, w, k, "k")
        state = kept * state + k[:, :, None] * v[:, None, :]
        total = kept * total + k[:, :, None]
        heads = torch.stack([q[h] @ state[h // 3] for h in range(6)])
        if config.normalize == "sum":
            heads = heads / torch.stack([q[h] @ total[h // 3] for h in range(6)])
        else:
            heads = heads * num_features**-0.5
        if config.normalize == "rms":
            rms = (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            heads = heads / rms * w["g_norm.weight"]
        outs.append(w["o_proj.weight"] @ (heads.flatten() * output_gate(config, w, token)))
    return torch.stack(outs)


def output_gate(
    config: LinearAttentionConfig, w: dict[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor | float:
    if config.output_gate == "none":
        return 1.0
    last = int(config.output_gate_rank is not None)
    gate = w["g_proj.1.weight"] @ (w["g_proj.0.weight"] @ x) if last else w["g_proj.0.weight"] @ x
    gate = gate + w[f"g_proj.{last}.bias"]
    return gate.sigmoid() if config.output_gate == "sigmoid" else gate * gate.sigmoid()


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


for_all_choices = pytest.mark.parametrize("config", CHOICES.values(), ids=CHOICES)


@for_all_choices
def test_mixer_follows_its_formulas(config: LinearAttentionConfig) -> None:
    mixer = make_mixer(config)
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
    _, k, _, log_decay = mixer._project(torch.randn(1, 1, 32, dtype=dtype), None)
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
@for_all_choices
def test_decoding_continues_a_prompt(config: LinearAttentionConfig, spiking: bool) -> None:
    mixer = make_mixer(config, spiking=spiking).eval()
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
        mixer._project(mixer.encode_in(x), None),
        plain._project(count * threshold, None),
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
    ("name", "weights", "values", "inner"),
    [
        ("low_rank-relu", 32 * 4 + 4 * 16, 8, {"encode_gate": 4}),
        ("head-hedgehog-sum", 32 * 2 + 8 * 8 * (6 + 2), 9, {"q_features.encode": 48,
                                                            "k_features.encode": 16}),
        ("low_rank-hedgehog-swish", 32 * 4 + 4 * 32 + 8 * 8 * 8 + 32 * 5 + 5 * 48, 8,
         {"encode_gate": 4, "q_features.encode": 48, "k_features.encode": 16,
          "encode_output_gate": 5}),
        ("none-elu-sum-sigmoid", 32 * 48, 9, {}),
    ],
)  # fmt: skip
def test_what_a_choice_adds_is_counted_and_spikes(
    name: str, weights: int, values: int, inner: dict[str, int]
) -> None:
    mixer = make_mixer(CHOICES[name], spiking=True)
    mixer(torch.randn(1, 20, 32), one_rank_context([20]))
    histograms = {name: e.take_histogram() for name, e in spike_encoders(mixer).items()}
    expected = {"encode_in": 20 * 32, "encode_out": 20 * 48}
    assert {n: int(h.sum()) for n, h in histograms.items()} == expected | {
        name: 20 * channels for name, channels in inner.items()
    }
    features = 16 if CHOICES[name].feature_map == "hedgehog" else 8
    assert mixer.mixing_flops([7, 20]) == 27 * 2 * features * values * (2 + 6)
    assert projection_weights(mixer) == 32 * (6 + 2 * 2 + 6) * 8 + weights


@pytest.mark.parametrize("name", ["head-hedgehog-sum", "none-elu-sum-sigmoid"])
@pytest.mark.parametrize("setting", [Setting(2, 1), Setting(1, 3, "zigzag", "scan")], ids=str)
def test_ranks_that_share_a_sequence_mix_and_send_as_foreseen(name: str, setting: Setting) -> None:
    lengths = [20, 50, 1, 30]
    whole, gradients, _, _ = mix_on_a_rank(World(0, 1, 0, 1), Setting(), name, lengths)
    ranks = run_ranks(setting.num_ranks, mix_on_a_rank, setting, name, lengths)
    for rank, (out, _, sent, foreseen) in enumerate(ranks):
        assert sent, "nothing was recorded"
        assert sent == foreseen, f"rank {rank}"
        for start, rows in out.items():
            assert_close(f"out at {start}", rows, whole[0][:, start:][:, : rows.shape[1]], F32)
    for parameter, expected in gradients.items():
        found = torch.stack([rank_gradients[parameter] for _, rank_gradients, _, _ in ranks])
        assert_close(f"d{parameter}", found.sum(0), expected, F32)


def mix_on_a_rank(
    world: World, setting: Setting, name: str, lengths: list[int]
) -> tuple[dict[int, torch.Tensor], dict[str, torch.Tensor], Any, Any]:
    """Return this rank's outputs by their first token, its share of the gradients, and the bytes
    that it sent forward and that were foreseen.
    """
    torch.manual_seed(0)
    mixer = make_mixer(CHOICES[name])
    x, dout = torch.randn(2, 1, sum(lengths), 32)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    context = build_context(world, setting, cu)
    layout = context.layout
    own = layout.segments[layout.sp_rank]
    rows = torch.cat([torch.arange(s.start, s.stop) for s in own])
    out = mixer(x[:, rows], context)
    sent = {key[:2]: entry.bytes for key, entry in context.comm.ledger.entries.items()}
    grads = torch.autograd.grad(out, list(mixer.parameters()), dout[:, rows])
    outs = out.detach().split([s.stop - s.start for s in own], 1)
    cost = SequenceCost(layout, setting.linear, itemsize=4)  # type: ignore[arg-type]
    return (
        {s.start: part for s, part in zip(own, outs, strict=True)},
        dict(zip(dict(mixer.named_parameters()), grads, strict=True)),
        sent,
        mixer.traffic(cost).forward,
    )


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (CHOICES["head-hedgehog-sum"], [4.0, 64.0]),
        (CHOICES["low_rank-exp-sum"], 2 * torch.logspace(3, 9, 8, base=2.0).tolist()),
        (CONFIG, 16 * [16.0]),
    ],
)
def test_states_begin_with_their_half_life(
    config: LinearAttentionConfig, wanted: list[float]
) -> None:
    mixer = config.build(32, 1e-6, SpikeConfig(enabled=False, k=3.0), OPS)
    mixer.reset(0.0, 0.0)
    log_decay = mixer._project(torch.randn(1, 1, 32), None)[3]
    assert_close("tokens", -math.log(2) / log_decay.flatten(), torch.tensor(wanted), F32)


@torch.no_grad()
@pytest.mark.parametrize("name", ["low_rank-hedgehog-swish", "none-elu-sum-sigmoid"])
def test_output_gates_begin_open(name: str) -> None:
    mixer = make_mixer(CHOICES[name])
    mixer.reset(0.0, 0.3)
    out = torch.randn(1, 3, 6, mixer._num_values)
    wide = open_mixer(CHOICES[name], mixer)._output(out, torch.zeros(1, 3, 32))
    found = mixer._output(out, torch.zeros(1, 3, 32))
    assert_close("out", found, wide * (1.0 if "swish" in name else 0.952574), F32)


def open_mixer(config: LinearAttentionConfig, mixer: LinearAttention) -> LinearAttention:
    """Return the mixer without its output gate."""
    bare = make_mixer(dataclasses.replace(config, output_gate="none", output_gate_rank=None))
    bare.load_state_dict(mixer.state_dict(), strict=False)
    return bare


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalize": "sum", "feature_map": "none"}, "feature_map=relu would do"),
        ({"output_gate_rank": 4}, "takes no output_gate_rank=4; set it to null"),
        ({"gate": "head"}, r"gate=head needs gate_normalizer and no gate_rank, given \(16.0, 4\)"),
        ({"gate": "none"}, r"gate=none takes no gate_rank and gate_normalizer, given \(4, 16.0\)"),
        (
            dataclasses.asdict(KEY_GATED) | {"half_life": [4.0, 8.0]},
            r"gate=key has no bias that half_life=\[4.0, 8.0\] could set",
        ),
        ({"half_life": [4.0]}, "at least 2 items"),
        ({"rope_theta": 1e4, "head_dim": 7}, "head_dim=7 must be even"),
        (
            {"rope_scaling": RopeScaling(kind="linear", factor=2.0)},
            "rope_theta=null leaves nothing to scale",
        ),
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
