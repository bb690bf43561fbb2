"""Sinks against their definition: rows put before each document alone, S + T of them from then on.

There softmax attention lets every row see the first S, and linear attention runs over all rows.
"""

import dataclasses
import itertools

import pytest
import torch
from helpers.assertions import assert_close
from helpers.models import build_model, one_rank_context, random_batch, tiny_model_config

from models.causal_lm import CausalLM, ParallelMixers
from models.mixers.linear_attention import LinearAttention
from models.mixers.softmax_attention import SoftmaxAttention
from models.spiking import spike_encoders
from ops.attention import attention
from ops.delta_rule import delta_rule
from ops.linear_attention import linear_attention
from ops.rotary import rotary_table
from ops.short_conv import short_conv
from parallel import sequence

LAYERS = ("linear", "window", "linear+window", "full")
WINDOW = 5
LENGTHS = [7, 1, 70, 2, 22]
ROTARY = [f"model.mixers.{name}.rope_theta=10000.0" for name in ("window", "full")]


def make_model(num_sinks: int, *, spiking: bool = False) -> CausalLM:
    config = tiny_model_config(*LAYERS, overrides=[f"model.num_sinks={num_sinks}", *ROTARY])
    model = build_model(config, spiking=spiking, dtype=torch.float32 if spiking else torch.float64)
    return model if spiking else model.double()


def mix(mixers: ParallelMixers, x: torch.Tensor, num_sinks: int) -> torch.Tensor:
    """Mix the rows [1, S + T, E] of the sinks and of one document."""
    outs = []
    for name, mixer in mixers.named_branches():
        if isinstance(mixer, LinearAttention):
            q, k, v, log_decay = mixer._project(x, None)
            out, _ = linear_attention(q, k, v, log_decay, impl="reference")
            out = mixer.g_norm(out)
        else:
            assert isinstance(mixer, SoftmaxAttention)
            positions = torch.arange(x.shape[1])
            q, k, v = mixer._project(x, rotary_table(positions, mixer.config.head_dim, 10000.0))
            window = mixer.config.window_size
            out, _ = attention(q, k, v, window_size=window, num_sinks=num_sinks, impl="reference")
        out = mixer.o_proj(out.flatten(2))
        outs.append(mixers.norms[name](out) if len(mixers.norms) else out)
    return sum(outs, torch.zeros_like(x))


def naive_loss(model: CausalLM, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed loss of one document [1, T]."""
    assert model.sinks is not None
    x = torch.cat([model.sinks.weight[None], model.embed(tokens)], dim=1)
    for _, layer in model.named_layers():
        x = x + mix(layer.mixer, layer.mixer_norm(x), model.config.num_sinks)
        x = x + layer.ffn(layer.ffn_norm(x))
    logits = model.head.logits(model.norm(x))[0, model.config.num_sinks :]
    return torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum")


@pytest.mark.parametrize("num_sinks", [1, WINDOW - 1, WINDOW + 3])
def test_packed_documents_equal_each_one_behind_its_own_sinks(num_sinks: int) -> None:
    model = make_model(num_sinks)
    batch = random_batch(LENGTHS, vocab_size=40)
    loss, _ = model(batch.tokens, batch.labels, one_rank_context(LENGTHS))
    found = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.zeros((), dtype=torch.float64)
    for start, stop in itertools.pairwise(batch.cu_seqlens.tolist()):
        part = slice(start, stop)
        expected = expected + naive_loss(model, batch.tokens[:, part], batch.labels[:, part])
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    assert_close("loss", loss, expected, torch.float32)
    for (name, _), a, b in zip(model.named_parameters(), found, wanted, strict=True):
        assert b.any(), name
        assert_close(name, a, b, torch.float32)  # gates are float32 whatever the dtype


def draw_inputs(name: str, num_rows: int) -> dict[str, torch.Tensor]:
    """Return the inputs of a mixing function; all but weight and bias have rows."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if name == "conv":
        return {"x": draw(1, num_rows, 8), "weight": draw(8, 4), "bias": draw(8)}
    q, k, v = (draw(1, num_rows, heads, 8) for heads in (4, 2, 2))
    if name.startswith("linear"):
        shape = (1, num_rows, 2, 8)[: 3 if name == "linear-scalar" else 4]
        return {"q": q, "k": k, "v": v, "log_decay": -draw(*shape).abs()}
    beta, log_decay = draw(1, num_rows, 2).sigmoid(), -draw(1, num_rows, 2, 8).abs()
    k = k / k.norm(dim=-1, keepdim=True)
    return {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay}


@pytest.mark.parametrize("num_sinks", [1, 5])  # a convolution has 3 taps before its own
@pytest.mark.parametrize("name", ["linear-scalar", "linear-vector", "delta", "conv"])
def test_recurrences_and_convolutions_run_on_from_the_sinks(name: str, num_sinks: int) -> None:
    S, T = num_sinks, sum(LENGTHS)
    ours, op = {
        "linear": (sequence.linear_attention, linear_attention),
        "delta": (sequence.delta_rule, delta_rule),
        "conv": (sequence.short_conv, short_conv),
    }[name.partition("-")[0]]
    inputs = {key: x.requires_grad_() for key, x in draw_inputs(name, S + T).items()}
    context = dataclasses.replace(one_rank_context(LENGTHS), num_sinks=S)
    found = ours(**inputs, context=context)

    def of_rows(rows: list[int]) -> torch.Tensor:
        own = {key: x[:, rows] if len(x) == 1 else x for key, x in inputs.items()}
        out, _ = op(**own, impl="reference")
        return out

    sinks = list(range(S))
    parts = [of_rows(sinks)]
    for start, length in zip(itertools.accumulate([S, *LENGTHS]), LENGTHS, strict=False):
        parts.append(of_rows([*sinks, *range(start, start + length)])[:, S:])
    expected = torch.cat(parts, dim=1)
    found = found if isinstance(found, torch.Tensor) else found[0]
    assert_close("out", found, expected, torch.float64)
    dout = torch.randn(expected.shape, dtype=torch.float64)
    grads, wanted = (torch.autograd.grad(x, inputs.values(), dout) for x in (found, expected))
    for key, a, b in zip(inputs, grads, wanted, strict=True):
        assert b.any(), key
        assert_close(f"d{key}", a, b, torch.float64)


def test_spike_statistics_leave_the_sinks_out() -> None:
    # Every rank has the same rows of sinks, which would count once per rank and micro batch.
    model = make_model(WINDOW, spiking=True)
    batch = random_batch([20], vocab_size=40)
    model(batch.tokens, batch.labels, one_rank_context([20]))
    for name, encoder in spike_encoders(model).items():
        channels = {"encode_gate": 4, "encode_out": 48 if "ffn" in name else 32}
        width = channels.get(name.rpartition(".")[2], 32)
        assert int(encoder.take_histogram().sum()) == 20 * width, name
