"""What is spiked, at which k, and the firing-rate term of the loss."""

import dataclasses

import pytest
import torch
from helpers.assertions import assert_close
from helpers.models import OPS, one_rank_context, random_batch, tiny_model_config

from conf.schema import SpikeConfig
from models.causal_lm import CausalLM
from models.spiking import FiringRate, SpikeEncoder, Spikes, set_spiking, spike_encoders

LENGTHS = [9, 14]
LOSS_SCALE = 0.25


def make_model(spike: SpikeConfig, *, num_sinks: int = 0) -> CausalLM:
    overrides = [f"model.num_sinks={num_sinks}", "model.init_std=0.3"]
    model = CausalLM(tiny_model_config("linear", "full", overrides=overrides), spike, OPS)
    model.reset_parameters(0)
    return model


def test_the_last_pattern_that_matches_says_the_k_of_an_input() -> None:
    patterns = {"layers.*.ffn.*": 2.0, "layers.1.*": None, "layers.1.ffn.encode_out": 1.5}
    model = make_model(SpikeConfig(enabled=True, k=4.0, k_by_input=patterns))
    found = {name: encoder.k for name, encoder in spike_encoders(model).items()}
    assert found == {
        "layers.0.mixer.branches.linear.encode_in": 4.0,
        "layers.0.mixer.branches.linear.encode_gate": 4.0,
        "layers.0.mixer.branches.linear.encode_out": 4.0,
        "layers.0.ffn.encode_in": 2.0,
        "layers.0.ffn.encode_out": 2.0,
        "layers.1.ffn.encode_out": 1.5,
    }
    x = torch.randn(3, 8)
    encoder = model.get_submodule("layers.1.ffn.encode_out")
    spikes = encoder(x)
    assert isinstance(spikes, Spikes)
    assert_close("threshold", spikes.threshold, x.abs().mean(-1, keepdim=True) / 1.5, x.dtype)
    assert model.get_submodule("layers.1.ffn.encode_in")(x) is x
    set_spiking(model, SpikeConfig(enabled=False, k=4.0, k_by_input=patterns))
    assert not spike_encoders(model)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'layers.7.\*' matches none of the inputs, which are lay"
    ):
        make_model(SpikeConfig(enabled=True, k=3.0, k_by_input={"layers.7.*": 2.0}))


def firing_rate(x: torch.Tensor, k: float) -> torch.Tensor:
    """Return it of every token, by its definition, differentiable."""
    size = x.abs()
    return (1 + size * k / size.mean(-1, keepdim=True)).log2().mean(-1)


def test_the_gradient_of_the_firing_rate_is_that_of_its_definition() -> None:
    x = torch.randn(2, 7, 40, dtype=torch.float64).requires_grad_()
    x.data[0, 3, 5] = 0
    dout = torch.randn_like(x)
    out = FiringRate.apply(x, 3.0, 0.7, 2)
    assert torch.equal(out, x)
    (found,) = torch.autograd.grad(out, x, dout)
    (drate,) = torch.autograd.grad(firing_rate(x, 3.0)[:, 2:].sum(), x)
    assert_close("dx", found, dout + 0.7 * drate, torch.float64)
    assert (drate[:, 2:] * x[:, 2:]).sum(-1).abs().max() < 1e-12  # the scale of x is free


def test_the_rate_enters_the_loss_of_a_model_once_per_token() -> None:
    """A step of its gradients lowers the rate; they are those of rate and loss together."""
    weight, batch = 0.3, random_batch(LENGTHS, 40)
    context = dataclasses.replace(one_rank_context(LENGTHS), aux_loss_scale=LOSS_SCALE)
    gradients: list[dict[str, torch.Tensor]] = []
    for rate_weight in (weight, 0.0):
        spike = SpikeConfig(enabled=True, k=3.0, rate_weight=rate_weight)
        model = make_model(spike, num_sinks=3)
        rates: list[torch.Tensor] = []

        def keep(encoder: SpikeEncoder, inputs: tuple[torch.Tensor]) -> None:
            assert encoder.k is not None
            rates.append(firing_rate(inputs[0], encoder.k)[:, 3:].sum())  # noqa: B023

        if not rate_weight:  # then it is added by hand
            for encoder in spike_encoders(model).values():
                encoder.register_forward_pre_hook(keep)
        loss_sum, _ = model.train()(batch.tokens, batch.labels, context)
        extra = sum(rates, torch.zeros(()))
        (loss_sum + weight * LOSS_SCALE * extra).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert rates
    assert extra.isfinite()
    for name, expected in gradients[1].items():
        assert_close(name, gradients[0][name], expected, torch.float32)
