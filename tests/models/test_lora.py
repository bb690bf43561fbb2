"""Adapters: exact merging, gradients, a beginning that changes nothing, and what is refused."""

import copy
import dataclasses

import pytest
import torch
from helpers.assertions import assert_close
from helpers.models import OPS, build_model, one_rank_context, random_batch, tiny_model_config
from torch.func import functional_call

from conf.schema import AdaptersConfig, SpikeConfig
from models.causal_lm import CausalLM
from models.lora import Adapter, adapters_of, merge_adapters

CONFIG = AdaptersConfig(rank=3, alpha=5.0, targets=["q_proj", "o_proj", "gk_proj", "ffn"])
MODEL = tiny_model_config("linear", "linear+window", overrides=("model.num_sinks=2",))
LENGTHS = (9, 1, 6)


def adapted_model(
    *, spiking: bool = False, dtype: torch.dtype = torch.float32, **changes: object
) -> CausalLM:
    """Build the model with adapters, drawn from seed 0, that add something."""
    spike = SpikeConfig(enabled=spiking, k=3.0)
    config = dataclasses.replace(CONFIG, **changes)
    model = CausalLM(MODEL, spike, OPS, dtype=dtype, adapters=config)
    model.reset_parameters(0)
    for _, _, adapter in adapters_of(model):
        torch.nn.init.normal_(adapter.b, std=0.1)
    return model


def losses(model: torch.nn.Module) -> torch.Tensor:
    """Return the loss of each of several batches."""
    context = one_rank_context(LENGTHS)
    batches = [random_batch(LENGTHS, 40, seed) for seed in range(3)]
    return torch.stack([model(b.tokens, b.labels, context)[0] for b in batches])


@pytest.mark.parametrize("spiking", [False, True], ids=["plain", "spiking"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_merged_model_gives_equal_bits(dtype, spiking):
    model = adapted_model(dtype=dtype, spiking=spiking)
    merged = copy.deepcopy(model)
    assert merge_adapters(merged) == 3 * 2 + 2 * 2 + 2 * 3
    names = dict(build_model(MODEL).named_parameters()).keys()
    assert dict(merged.named_parameters()).keys() == names
    assert torch.equal(losses(merged), losses(model))
    plain = build_model(MODEL, dtype=dtype, spiking=spiking)
    assert not torch.equal(losses(plain), losses(model)), "the adapters add something"
    assert merge_adapters(merged) == 0


@pytest.mark.parametrize("spiking", [False, True], ids=["plain", "spiking"])
@pytest.mark.parametrize("trained", ["adapters", "all"])
def test_gradients_are_those_of_weight_plus_product(trained, spiking):
    model = adapted_model(spiking=spiking)
    adapters = {name: adapter for name, _, adapter in adapters_of(model)}
    model.requires_grad_(trained == "all")
    for adapter in adapters.values():
        adapter.requires_grad_(True)
    losses(model).sum().backward()
    plain = build_model(MODEL, spiking=spiking).requires_grad_(trained == "all")
    factors = {
        name: [x.detach().clone().requires_grad_() for x in (adapter.a, adapter.b)]
        for name, adapter in adapters.items()
    }
    weights = {
        f"{name}.weight": plain.get_submodule(name).weight + 5.0 / 3 * (b @ a)
        for name, (a, b) in factors.items()
    }
    functional = torch.nn.Module()
    functional.forward = lambda *inputs: functional_call(plain, weights, inputs)
    losses(functional).sum().backward()
    for name, (a, b) in factors.items():
        assert_close(f"{name}.a", adapters[name].a.grad, a.grad, torch.float32)
        assert_close(f"{name}.b", adapters[name].b.grad, b.grad, torch.float32)
    base = {n: p for n, p in model.named_parameters() if ".adapter." not in n}
    for name, parameter in plain.named_parameters():
        if trained == "all":
            assert_close(name, base[name].grad, parameter.grad, torch.float32)
        else:
            assert base[name].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_rows", [1, 7])
def test_product_and_its_gradients_in_each_dtype(num_rows, dtype):
    adapter = Adapter(16, 12, dataclasses.replace(CONFIG, rank=2))
    torch.nn.init.normal_(adapter.a)
    torch.nn.init.normal_(adapter.b)
    weight, x = torch.randn(12, 16), torch.randn(1, num_rows, 16).to(dtype)
    dout = torch.randn(1, num_rows, 12).to(dtype)
    ours = [t.detach().requires_grad_() for t in (x, weight)]
    out = adapter(*ours)
    out.backward(dout)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, adapter.a, adapter.b)]
    wanted = exact[0] @ (exact[1] + 2.5 * exact[3] @ exact[2]).T
    wanted.backward(dout.double())
    assert_close("out", out, wanted, dtype)
    for name, mine, other in zip("xwab", (*ours, adapter.a, adapter.b), exact, strict=True):
        assert mine.grad.dtype == mine.dtype
        assert_close(name, mine.grad, other.grad, dtype)


@torch.no_grad()
def test_adapters_begin_at_nothing_and_depend_on_seed_and_name_alone():
    model = adapted_model()
    model.reset_parameters(7)
    assert torch.equal(losses(model), losses(build_model(MODEL, seed=7)))
    first = {name: adapter.a.clone() for name, _, adapter in adapters_of(model)}
    fewer = adapted_model(targets=["o_proj"])
    fewer.reset_parameters(7)
    for name, _, adapter in adapters_of(fewer):
        assert torch.equal(adapter.a, first[name])
    name, other = (f"layers.{i}.ffn.up_proj" for i in (0, 1))
    assert not torch.equal(first[name], first[other])
    assert float(first[name].std()) == pytest.approx(32**-0.5, rel=0.3)
    model.reset_adapters(8)
    assert all(not torch.equal(adapter.a, first[name]) for name, _, adapter in adapters_of(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": ["q_proj", "w_proj"]},
            "no projection of the model is w_proj; use some of .*q_p",
        ),
        ({"rank": 5}, r"rank=5 exceeds layers.0.*gk_proj.0, 4 x 32; use adapters.rank=4 or less"),
    ],
)
def test_impossible_adapters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        adapted_model(**changes)
