"""Models in INT8: rounding, calibration, integer products, caches that decode what forward sees."""

import dataclasses

import pytest
import torch
from helpers.assertions import assert_close
from helpers.models import build_model, one_rank_context, random_batch, tiny_model_config

from conf.schema.quantization import QuantizationConfig
from models.cache import KeyValueCache, KeyValueScales, LinearState
from models.causal_lm import CausalLM
from models.layers import Projection
from models.quantize import (
    IntegerExperts,
    IntegerProjection,
    Statistics,
    apply_quantization,
    encode_integers,
    observe,
    quantize_weight,
)
from models.spiking import Spikes
from ops.spike import encode, spike_count, spike_matmul, step_weights
from ops.spike.coding import CODINGS

EXPERTS = (
    "+moe@model.ffns.dense.moe=top1_shared",
    "model.ffns.dense.moe.num_experts=4",
)


def config(**changes: object) -> QuantizationConfig:
    return dataclasses.replace(QuantizationConfig(), **changes)


def calibrate(model: CausalLM, lengths: list[int]) -> Statistics:
    """Return what the model shows of a batch of documents."""
    statistics = Statistics()
    batch = random_batch(lengths, model.config.vocab_size)
    with torch.no_grad(), observe(model, statistics):
        model(batch.tokens, batch.labels, one_rank_context(lengths))
    return statistics


def quantized(model: CausalLM, settings: QuantizationConfig) -> CausalLM:
    apply_quantization(model.eval(), settings, calibrate(model, [30, 20]))
    return model


def test_weights_are_rounded_to_the_nearest_of_a_symmetric_grid() -> None:
    weight = torch.tensor([[1.27, -0.004, 0.006, -1.27], [0.0, 0.0, 0.0, 0.0]])
    codes, scale = quantize_weight(weight, None)
    assert codes.tolist() == [[127, 0, 1, -127], [0, 0, 0, 0]]
    assert_close("scale", scale[0], torch.tensor([0.01]), torch.float32)
    assert (scale > 0).all()


def test_a_group_has_a_scale_of_its_own() -> None:
    weight = torch.randn(6, 150) * torch.cat([torch.ones(64), 100 * torch.ones(86)])
    codes, scale = quantize_weight(weight, 64)
    assert scale.shape == (6, 3)
    for group, some in enumerate((slice(0, 64), slice(64, 128), slice(128, 150))):
        assert (codes[:, some].abs().amax(1) == 127).all()
        error = (weight[:, some] - codes[:, some] * scale[:, group : group + 1]).abs()
        assert (error <= 0.5001 * scale[:, group : group + 1]).all()


def test_clipping_loses_less_where_inputs_are_large() -> None:
    weight = torch.randn(8, 64)
    weight[:, 3] = 20.0  # sets the scale, and meets small inputs
    moment = torch.ones(64)
    moment[3] = 1e-6
    losses = []
    for given in (None, moment):
        codes, scale = quantize_weight(weight, None, given)
        losses.append(((weight - codes * scale).square() * moment).sum())
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("group_size", [None, 64])
def test_products_from_trains_are_those_from_counts(coding: str, group_size: int | None) -> None:
    old = Projection(160, 40, bias=True)
    old.reset(0.1)
    new = IntegerProjection(old, config(group_size=group_size), None)
    new.take(old.weight)
    x = torch.randn(5, 160)
    count, threshold = spike_count(x.abs() if coding in ("binary", "bitwise") else x)
    train = encode(count, coding).to(torch.int8)
    weights = step_weights(coding, len(train)).tolist()
    total = torch.zeros(5, 40)
    size = group_size or 160
    for group, start in enumerate(range(0, 160, size)):
        some = slice(start, start + size)
        weight = new.weight[:, some].contiguous()
        # Integers until here: one product for every step of the train.
        sums = sum(
            c * spike_matmul(s[:, some], weight) for c, s in zip(weights, train, strict=True)
        )
        total += sums.float() * new.scale[:, group]
    assert torch.equal(new(Spikes(count, threshold)), total * threshold + new.bias)


def test_activations_without_spikes_are_integers() -> None:
    x = torch.randn(3, 50)
    for largest in (127, 32767):
        spikes = encode_integers(x, largest)
        assert torch.equal(spikes.count, spikes.count.round())
        assert (spikes.count.abs().amax(-1) == largest).all()
        assert (spikes.count * spikes.threshold - x).abs().max() <= x.abs().max() / largest


@pytest.mark.parametrize("spiking", [False, True])
@pytest.mark.parametrize(
    "settings", [config(kv_cache="none"), config(group_size=64, clip="mse", head="int8")]
)
def test_integers_do_what_their_weights_would(spiking: bool, settings: QuantizationConfig) -> None:
    shape = tiny_model_config("linear", "linear", overrides=EXPERTS)
    model = quantized(build_model(shape, spiking=spiking), settings)
    # A float model with what the integers stand for.
    twin = build_model(shape, spiking=spiking).eval()
    tensors = dict(model.named_buffers()) | dict(model.named_parameters())
    size = settings.group_size
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            module = name.removesuffix(".weight")
            if f"{name}.0.scale" in tensors:
                rows = [_float(tensors, f"{name}.{e}", size) for e in range(len(parameter))]
                parameter.copy_(torch.stack(rows))
            elif f"{module}.scale" in tensors:
                parameter.copy_(_float(tensors, module, size))
            else:
                parameter.copy_(tensors[name])
    assert isinstance(model.get_submodule("layers.0.ffn.experts"), IntegerExperts)
    batch, context = random_batch([9, 14], shape.vocab_size), one_rank_context([9, 14])
    with torch.no_grad():
        expected, count = twin(batch.tokens, batch.labels, context)
        actual, same = model(batch.tokens, batch.labels, context)
    assert count == same
    # Counts flip where roundings differ; 16 bits of other activations are not all of 24.
    assert float(actual) == pytest.approx(float(expected), rel=3e-3 if spiking else 1e-3)


def _float(tensors: dict[str, torch.Tensor], name: str, size: int | None) -> torch.Tensor:
    weight = tensors[f"{name}.weight"]
    scale = tensors[f"{name}.scale"].repeat_interleave(size or weight.shape[1], 1)
    return weight * scale[:, : weight.shape[1]]


@pytest.mark.parametrize("num_sinks", [0, 2])
def test_decoding_from_int8_keys_is_what_forward_computes(num_sinks: int) -> None:
    sinks = f"model.num_sinks={num_sinks}"
    shape = tiny_model_config("full", "window", overrides=[sinks, "model.tie_embeddings=false"])
    model = quantized(build_model(shape, spiking=True), config(head="int8"))
    tokens = random_batch([16], shape.vocab_size).tokens
    with torch.inference_mode():
        hidden = model.hidden(tokens, one_rank_context([16]))
        expected = model.head.logits(hidden[0])
        cache = model.new_cache()
        logits = [model.prefill(tokens[:, :4], one_rank_context([4]), cache)]
        # Beyond the window of 5 tokens, and beyond what its ring held after the prompt.
        for i in range(4, 16):
            logits.append(model.decode(tokens[:, i : i + 1], cache, i))
    for entry in (entry for layer in cache for entry in layer.values()):
        assert isinstance(entry, KeyValueCache)
        assert entry._k is not None
        assert entry._k.dtype == torch.int8
    assert_close("logits", torch.cat(logits), expected[3:], torch.float32)


def test_keys_and_values_keep_to_their_scales() -> None:
    scales = KeyValueScales(2, 8)
    scales.key, scales.value = torch.rand(2, 8) + 0.1, torch.rand(2, 8) + 0.1
    q = torch.randn(1, 3, 4, 8)
    k, v = (127 * scale * (2 * torch.rand(1, 3, 2, 8) - 1) for scale in (scales.key, scales.value))
    new_q, codes, values = scales.encode(q, k, v)
    assert torch.equal(codes, codes.round())
    assert ((codes * scales.key - k).abs() <= 0.5001 * scales.key).all()
    assert ((values * scales.value - v).abs() <= 0.5001 * scales.value).all()
    scores = torch.einsum("btgd,btgd->btg", new_q, codes.repeat_interleave(2, 2))
    rounded = (codes * scales.key).repeat_interleave(2, 2)
    assert_close("scores", scores, torch.einsum("btgd,btgd->btg", q, rounded), torch.float32)
    out = scales.decode(values.repeat_interleave(2, 2))
    assert_close("out", out, (values * scales.value).repeat_interleave(2, 2), torch.float32)
    assert scales.encode(q, 1e6 * k, v)[1].abs().max() == 127


def test_state_in_int8_is_near_and_keeps_zeros() -> None:
    state = torch.randn(2, 3, 8, 5)
    state[..., -1] *= 1e3  # as the sum of weights, beside values
    state[0, 0], state[1, 1, 2] = 0.0, 0.0
    cache = LinearState(is_int8=True)
    assert cache.state is None
    cache.state = state
    assert cache._state is not None
    assert cache._state.dtype == torch.int8
    found = cache.state
    largest = (state / state.abs().amax(-2, keepdim=True).clamp_min(1e-30)).abs().amax(-1)
    error = (found - state).abs() / state.abs().amax(-2, keepdim=True).clamp_min(1e-30)
    assert (error <= 0.501 / 127 * largest[..., None]).all()
    assert torch.equal(found == 0, found.abs() < 1e-20)
    assert (found[0, 0] == 0).all()


def test_a_state_in_int8_decodes_nearly_the_same() -> None:
    shape = tiny_model_config("linear", "linear")
    logits = []
    for state in ("none", "int8"):
        model = quantized(build_model(shape), config(state=state))
        tokens = random_batch([24], shape.vocab_size).tokens
        cache = model.new_cache()
        with torch.inference_mode():
            out = [model.prefill(tokens[:, :2], one_rank_context([2]), cache)]
            out += [model.decode(tokens[:, i : i + 1], cache, i) for i in range(2, 24)]
        logits.append(torch.cat(out))
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < error < 0.05


def test_calibration_sees_inputs_and_leaves_the_model_as_it_was() -> None:
    model = build_model(tiny_model_config("full"), spiking=True).eval()
    seen: list[torch.Tensor] = []
    projection = model.get_submodule("layers.0.ffn.gate_proj")
    hook = projection.register_forward_pre_hook(
        lambda _, x: seen.append(x[0].count * x[0].threshold)
    )
    statistics = calibrate(model, [30, 20])
    again = Statistics()
    with torch.no_grad(), observe(model, again):
        for seed in (0, 1):
            batch = random_batch([25], model.config.vocab_size, seed)
            model(batch.tokens, batch.labels, one_rank_context([25]))
    hook.remove()
    name = "layers.0.ffn.gate_proj"
    assert_close("moment", statistics.moments[name], seen[0][0].square().mean(0), torch.float32)
    both = torch.cat([seen[1][0], seen[2][0]]).square().mean(0)
    assert_close("moment of two passes", again.moments[name], both, torch.float32)
    assert model.get_submodule("layers.0.mixer.branches.full").kv_scales is None
    keys, values = statistics.largest["layers.0.mixer.branches.full"]
    assert keys.shape == values.shape == (2, 8)
    # Rotation moves what is large between the channels of a pair.
    assert torch.equal(keys[:, :4], keys[:, 4:])
    assert not torch.equal(values[:, :4], values[:, 4:])
