"""The pins of the config reach the operators inside a layer."""

import pytest
import torch
from helpers.models import one_rank_context, random_batch, tiny_model_config

from conf.schema import OpsConfig, SpikeConfig
from models.causal_lm import CausalLM

PINNED = ["rms_norm", "rotary", "swiglu"]


def run(ops: OpsConfig) -> torch.Tensor:
    """Return the loss of a tiny float32 model."""
    config = tiny_model_config(
        "linear", "window", overrides=["model.mixers.window.rope_theta=10000.0"]
    )
    model = CausalLM(config, SpikeConfig(enabled=False, k=3.0), ops)
    model.reset_parameters(0)
    batch = random_batch([5, 9], config.vocab_size)
    loss_sum, _ = model(batch.tokens, batch.labels, one_rank_context([5, 9]))
    return loss_sum.detach()


@pytest.mark.parametrize("op", PINNED)
def test_a_pin_that_cannot_run_is_refused(op: str) -> None:
    with pytest.raises(ValueError, match=rf"ops\.{op}=cpp: "):
        run(OpsConfig(**{op: "cpp"}))


def test_pinned_to_their_definitions_operators_give_the_same_loss() -> None:
    expected = run(OpsConfig())
    actual = run(OpsConfig(**dict.fromkeys(PINNED, "reference")))
    torch.testing.assert_close(actual, expected)
