"""The language model: decoding, causality, packing, recomputation, head, initial weights."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.assertions import assert_close
from helpers.models import (
    build_model,
    one_rank_context,
    random_batch,
    tiny_model_config,
)

from models.causal_lm import CausalLM, ParallelMixers
from models.layers import Projection
from models.spiking import SpikeEncoder, Spikes, spike_encoders

WINDOW = 5
LAYERS = {
    "linear": ("linear", "linear"),
    "window": ("window", "window"),
    "full": ("full", "full"),
    "parallel": ("linear+window", "linear+full"),
    "hybrid": ("linear", "window", "linear+window", "full"),
    "sinks": ("linear", "window", "linear+window", "full"),
}
SINKS = 7  # more than the window holds
every_model = pytest.mark.parametrize("kind", LAYERS)
spiking_or_not = pytest.mark.parametrize("spiking", [False, True], ids=["plain", "spiking"])


def make_model(kind: str, *overrides: str, **options: Any) -> CausalLM:
    """Build a tiny model; the options are those of build_model."""
    sinks = (f"model.num_sinks={SINKS}",) if kind == "sinks" else ()
    config = tiny_model_config(*LAYERS[kind], overrides=[*sinks, *overrides])
    return build_model(config, **options)


def every_model_after(*prompts: int) -> pytest.MarkDecorator:
    """Return the cases of every model with prompts of these lengths; sinks need a prompt."""
    cases = [(kind, prompt) for kind in LAYERS for prompt in prompts if prompt or kind != "sinks"]
    return pytest.mark.parametrize(("kind", "prompt"), cases)


def draw_tokens(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(40, (1, count), generator=generator)


def forward_logits(model: CausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits [T, vocab] of one document, all at once."""
    num_sinks = model.config.num_sinks
    context = dataclasses.replace(one_rank_context([tokens.shape[1]]), num_sinks=num_sinks)
    x = model.embed(tokens)
    if model.sinks is not None:
        x = model.sinks(x)
    for _, layer in model.named_layers():
        x = layer(x, context)
    return model.head.logits(model.norm(x))[0, num_sinks:]


def decoded_logits(model: CausalLM, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Return the logits that follow tokens prompt - 1 and up, one token at a time."""
    cache = model.new_cache()
    outs = []
    if prompt:
        context = one_rank_context([prompt])
        outs.append(model.prefill(tokens[:, :prompt], context, cache))
    for position in range(prompt, tokens.shape[1]):
        outs.append(model.decode(tokens[:, position : position + 1], cache, position))
    return torch.cat(outs)


def loss_and_gradients(
    model: CausalLM, lengths: list[int], tokens: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_sum, num_valid = model(tokens, labels, one_rank_context(lengths))
    loss_sum.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return {"loss_sum": loss_sum.detach(), "num_valid": num_valid} | gradients


def margin_to_rounding(model: CausalLM, tokens: torch.Tensor) -> float:
    """Return how near any x / threshold of a forward pass is to where its count changes."""
    margins = []

    def observe(encoder: SpikeEncoder, inputs: tuple[torch.Tensor]) -> None:
        x = inputs[0].double()
        ratio = x / (x.abs().mean(-1, keepdim=True) / encoder.k)
        margins.append(float((ratio - ratio.floor() - 0.5).abs().min()))

    handles = [e.register_forward_pre_hook(observe) for e in spike_encoders(model).values()]
    forward_logits(model, tokens)
    for handle in handles:
        handle.remove()
    return min(margins)


@torch.no_grad()
@every_model_after(0, 1, 3, WINDOW, 9, 70)
def test_decoding_equals_the_parallel_forward(kind: str, prompt: int) -> None:
    model = make_model(kind).eval()
    tokens = draw_tokens(prompt + 12)
    expected = forward_logits(model, tokens)[max(prompt - 1, 0) :]
    torch.testing.assert_close(decoded_logits(model, tokens, prompt), expected, atol=1e-4, rtol=0)
    assert float(expected.std()) > 0.1  # else the tolerance would say nothing


@torch.no_grad()
@pytest.mark.parametrize("kind", ["full", "sinks"])
def test_a_cache_that_grows_keeps_every_key(kind: str) -> None:
    model = make_model(kind).eval()
    tokens = draw_tokens(140)  # the buffers begin with 64 slots
    expected = forward_logits(model, tokens)
    torch.testing.assert_close(decoded_logits(model, tokens, 1), expected, atol=1e-4, rtol=0)


@torch.no_grad()
@every_model_after(0, 3, 9)
def test_spiking_decoding_equals_the_parallel_forward(kind: str, prompt: int) -> None:
    # The two ways round differently in the last bit. A count flips if x / threshold lies that
    # near to a half, and then the logits differ for good; so take tokens where none is near.
    model = make_model(kind, spiking=True).eval()
    draws = (draw_tokens(prompt + 8, seed) for seed in range(100))
    tokens = next(tokens for tokens in draws if margin_to_rounding(model, tokens) > 2e-5)
    expected = forward_logits(model, tokens)[max(prompt - 1, 0) :]
    torch.testing.assert_close(decoded_logits(model, tokens, prompt), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_sinks_enter_the_cache_with_the_first_token_of_a_prompt() -> None:
    model = make_model("sinks").eval()
    with pytest.raises(ValueError, match=r"position=0 .*model\.num_sinks=7.* prefill"):
        model.decode(draw_tokens(1), model.new_cache(), 0)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "sinks"])
def test_sequences_decode_together(kind: str) -> None:
    model = make_model(kind).eval()
    tokens = torch.cat([draw_tokens(12, seed) for seed in (0, 1, 2)])
    cache = model.new_cache()
    steps = [model.decode(tokens[:, t : t + 1], cache, t) for t in range(12)]
    for row, decoded in zip(tokens, torch.stack(steps, 1), strict=True):
        torch.testing.assert_close(decoded, forward_logits(model, row[None]), atol=1e-4, rtol=0)


def cached_bytes(model: CausalLM, num_tokens: int) -> int:
    """Return what the cache holds after a prompt of 6 tokens and decoding up to `num_tokens`."""

    def tensors(value: object) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | dict):
            for item in value.values() if isinstance(value, dict) else value:
                yield from tensors(item)
        elif hasattr(value, "__dict__"):
            yield from tensors(vars(value))

    cache = model.new_cache()
    tokens = draw_tokens(num_tokens)
    model.prefill(tokens[:, :6], one_rank_context([6]), cache)
    for position in range(6, num_tokens):
        model.decode(tokens[:, position : position + 1], cache, position)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(cache)
    }
    return sum(storages.values())


@torch.no_grad()
@pytest.mark.parametrize("num_sinks", [0, SINKS])
@pytest.mark.parametrize("layer", ["linear", "window", "linear+window", "full"])
def test_only_the_cache_of_full_attention_grows(layer: str, num_sinks: int) -> None:
    config = tiny_model_config(layer, overrides=[f"model.num_sinks={num_sinks}"])
    model = build_model(config).eval()
    short, long = cached_bytes(model, 7), cached_bytes(model, 80)
    assert short > 0
    assert long > short if layer == "full" else long == short


@torch.no_grad()
@every_model
@pytest.mark.parametrize("t", [1, 4, 63, 64, 99])
def test_a_token_changes_no_earlier_output(kind: str, t: int) -> None:
    model = make_model(kind).eval()
    tokens = draw_tokens(100)
    changed = tokens.clone()
    changed[0, t] = (changed[0, t] + 1) % 40
    before, after = forward_logits(model, tokens), forward_logits(model, changed)
    # A chunk's reference point may move with a later decay: equal up to rounding.
    assert_close("logits", after[:t], before[:t], torch.float32)
    assert (after[t] - before[t]).abs().max() > 1e-2
    if t < 99:
        assert (after[t + 1] - before[t + 1]).abs().max() > 1e-3


@every_model
def test_packed_documents_equal_separate_ones(kind: str) -> None:
    model = make_model(kind)
    lengths = [7, 1, 70, 2, 22]
    batch = random_batch(lengths, vocab_size=40)
    packed = loss_and_gradients(model, lengths, batch.tokens, batch.labels)
    separate: dict[str, torch.Tensor] = {}
    for start, length in zip(batch.cu_seqlens.tolist(), lengths, strict=False):
        part = slice(start, start + length)
        one = loss_and_gradients(model, [length], batch.tokens[:, part], batch.labels[:, part])
        separate = {name: value + separate.get(name, 0) for name, value in one.items()}
    assert packed["num_valid"] == separate["num_valid"] == 102 - 5
    for name, value in packed.items():
        assert_close(name, value, separate[name], torch.float32)


@every_model
@spiking_or_not
def test_recomputation_changes_nothing(kind: str, spiking: bool) -> None:
    lengths = [9, 1, 70]
    batch = random_batch(lengths, vocab_size=40)
    results, histograms = {}, {}
    for recompute in ("none", "selective", "full"):
        model = make_model(kind, spiking=spiking, recompute=recompute)
        results[recompute] = loss_and_gradients(model, lengths, batch.tokens, batch.labels)
        encoders = spike_encoders(model)
        histograms[recompute] = {n: e.take_histogram() for n, e in encoders.items()}
    for recompute in ("selective", "full"):
        for name, value in results["none"].items():
            assert torch.equal(results[recompute][name], value), f"{recompute}: {name}"
        for name, value in histograms["none"].items():
            assert torch.equal(histograms[recompute][name], value), f"{recompute}: {name}"


@torch.no_grad()
def test_parallel_mixers_sum_their_normalised_outputs() -> None:
    model = make_model("parallel")
    mixers = model.layers["0"].mixer
    assert isinstance(mixers, ParallelMixers)
    x, context = torch.randn(1, 20, 32), one_rank_context([20])
    expected = torch.zeros_like(x)
    for name, mixer in mixers.named_branches():
        weight = dict(mixers.named_parameters())[f"norms.{name}.weight"].uniform_(0.5, 1.5)
        out = mixer(x, context)
        expected += weight * out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert len(mixers.norms) == 2
    assert_close("out", mixers(x, context), expected, torch.float32)


def test_tied_head_is_the_embedding() -> None:
    tied = make_model("hybrid", "model.tie_embeddings=true")
    untied = make_model("hybrid", "model.tie_embeddings=false")
    names = {name for name, _ in untied.named_parameters()}
    assert names - {name for name, _ in tied.named_parameters()} == {"head.weight"}
    with torch.no_grad():
        for name, parameter in untied.named_parameters():
            parameter.copy_(tied.state_dict()[name])
    batch = random_batch([20], vocab_size=40)
    one = loss_and_gradients(tied, [20], batch.tokens, batch.labels)
    two = loss_and_gradients(untied, [20], batch.tokens, batch.labels)
    assert torch.equal(one["loss_sum"], two["loss_sum"])
    total = two["embed.weight"] + two["head.weight"]
    assert_close("embed.weight", one["embed.weight"], total, torch.float32)


def test_every_projection_reads_spikes() -> None:
    model = make_model("hybrid", spiking=True)
    projections = {n: m for n, m in model.named_modules() if isinstance(m, Projection)}
    inputs: dict[str, object] = {}
    for name, module in projections.items():
        module.register_forward_pre_hook(
            lambda _, given, name=name: inputs.update({name: given[0]})
        )
    batch = random_batch([20], vocab_size=40)
    model(batch.tokens, batch.labels, one_rank_context([20]))
    assert inputs.keys() == projections.keys()
    for name, given in inputs.items():
        assert isinstance(given, Spikes), name
        assert torch.equal(given.count, given.count.round()), name
    # 7 projections in each layer, 2 more in a linear branch, another 4 or 6 in a second branch.
    assert len(projections) == 9 + 7 + 13 + 7


@pytest.mark.parametrize("bias", [False, True])
def test_projection_of_spikes_is_threshold_times_integer_product(bias: bool) -> None:
    projection = Projection(50, 7, bias=bias)
    weight, counts = torch.randint(-100, 100, (7, 50)), torch.randint(-20, 20, (1, 9, 50))
    threshold = torch.rand(1, 9, 1)
    shift = torch.randn(7) if bias else torch.zeros(7)
    with torch.no_grad():
        projection.weight.copy_(weight)
        if projection.bias is not None:
            projection.bias.copy_(shift)
    out = projection(Spikes(counts.float(), threshold))
    # Every partial sum is an integer below 2**24, so W s is exact in float32.
    assert torch.equal(out, (counts @ weight.T).float() * threshold + shift)


@pytest.mark.parametrize("tied", ["true", "false"])
@spiking_or_not
def test_initial_loss_is_that_of_a_uniform_guess(tied: str, spiking: bool) -> None:
    overrides = (f"model.tie_embeddings={tied}", "model.init_std=0.02")
    model = make_model("hybrid", *overrides, spiking=spiking)
    batch = random_batch([200], vocab_size=40)
    loss_sum, num_valid = model(batch.tokens, batch.labels, one_rank_context([200]))
    assert loss_sum.dtype == torch.float32
    assert float(loss_sum.detach() / num_valid) == pytest.approx(math.log(40), abs=0.1)


@every_model
def test_initial_weights_depend_on_the_seed_alone(kind: str) -> None:
    first = make_model(kind, seed=3)
    torch.manual_seed(99)
    second = make_model(kind, seed=0, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.fill_(7.0)
    state = torch.get_rng_state()
    second.reset_parameters(3)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.embed.weight, make_model(kind, seed=4).embed.weight)


def test_initial_weights_have_the_configured_spread() -> None:
    model = make_model("hybrid", "model.hidden_size=128", "model.tie_embeddings=false")
    out_std = 0.1 / (2 * 4) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            gain = (
                0.1 if ".mixer.norms." in name else 1.0
            )  # of a branch, no louder than the embedding
            assert torch.equal(parameter, torch.full_like(parameter, gain)), name
        else:
            std = out_std if "o_proj" in name or "down_proj" in name else 0.1
            sampling_error = (2 * parameter.numel()) ** -0.5
            assert float(parameter.detach().std()) == pytest.approx(std, rel=4 * sampling_error), (
                name
            )


@torch.no_grad()
def test_a_window_that_holds_everything_is_full_attention() -> None:
    wide = build_model(
        tiny_model_config("window", overrides=["model.mixers.window.window_size=30"])
    )
    full = build_model(
        tiny_model_config("full", overrides=["model.mixers.full.rope_theta=10000.0"])
    )
    tokens = draw_tokens(30)
    assert_close(
        "logits", forward_logits(wide, tokens), forward_logits(full, tokens), torch.float32
    )
    narrow = build_model(tiny_model_config("window"))
    difference = forward_logits(narrow, tokens) - forward_logits(full, tokens)
    assert difference[:WINDOW].abs().max() < 1e-5
    assert difference[WINDOW:].abs().max() > 1e-2


@every_model
def test_bfloat16_follows_float32(kind: str) -> None:
    # A head of few channels can be nearly silent, and its norm then magnifies every rounding.
    wide_heads = "model.mixers.linear.head_dim=64"
    batch = random_batch([40, 30], vocab_size=40)
    wide = make_model(kind, wide_heads)
    expected = loss_and_gradients(wide, [40, 30], batch.tokens, batch.labels)
    narrow = make_model(kind, wide_heads, dtype=torch.bfloat16)
    found = loss_and_gradients(narrow, [40, 30], batch.tokens, batch.labels)
    assert all(parameter.dtype == torch.float32 for parameter in narrow.parameters())
    assert found["loss_sum"].dtype == torch.float32
    assert_close("loss_sum", found["loss_sum"], expected["loss_sum"], torch.bfloat16)
    a, b = (
        torch.cat([x[n].flatten() for n, _ in wide.named_parameters()]) for x in (found, expected)
    )
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.999
