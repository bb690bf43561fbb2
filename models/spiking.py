"""Spiking of a projection's input (spec: eq. 19-21 of arXiv:2509.05276) and its statistics."""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from conf.schema import SpikeConfig
from ops.spike import MAX_COUNT, MAX_THRESHOLD, MIN_THRESHOLD, spike_count, spike_histogram
from parallel.recompute import is_backward

SAMPLED_TOKENS = 128
"""Tokens of a forward pass, evenly spaced, that statistics are taken from."""
SAMPLED_CHANNELS = 48
"""Channels of a token whose counts are kept as an example."""


@dataclass(frozen=True)
class Spikes:
    """An activation as counts: it stands for `count * threshold`."""

    count: torch.Tensor
    """[..., channels], signed integers in the compute dtype."""
    threshold: torch.Tensor
    """[..., 1] float32."""


Activation = torch.Tensor | Spikes


class SpikeEncoder(nn.Module):
    """Turn the input of one or several projections into spikes; the identity without a k."""

    def __init__(self, config: SpikeConfig, impl: str | None = None) -> None:
        super().__init__()
        self.impl = impl
        self.k = config.k if config.enabled else None
        self.rate_weight = config.rate_weight
        self.loss_scale = 0.0
        """Weight of one token's firing rate in what is differentiated, before `rate_weight`."""
        self.num_sinks = 0
        """First rows of a training pass that statistics leave out: every rank has the same ones."""
        self.observes = False
        """Whether it takes statistics in evaluation as well."""
        self.histogram: torch.Tensor | None = None
        """float64 [MAX_COUNT + 1]: how often each |count| occurred since `take_histogram`."""
        self.sample: torch.Tensor | None = None
        """Counts of the first channels of a token that was seen last."""

    def forward(self, x: torch.Tensor) -> Activation:
        if self.k is None:
            return x
        if self.training and self.rate_weight:
            x = FiringRate.apply(x, self.k, self.rate_weight * self.loss_scale, self.num_sinks)
        count, threshold = spike_count(x, self.k, impl=self.impl)
        if (self.training or self.observes) and not is_backward():  # seen before it runs again
            self._observe(count.detach()[..., self.num_sinks :, :])
        return Spikes(count, threshold)

    def take_histogram(self) -> torch.Tensor:
        """Return the counts seen since the last call and start afresh."""
        histogram, self.histogram = self.histogram, None
        return torch.zeros(MAX_COUNT + 1, dtype=torch.float64) if histogram is None else histogram

    def _observe(self, count: torch.Tensor) -> None:
        rows = count.reshape(-1, count.shape[-1])
        rows = rows[:: max(1, rows.shape[0] // SAMPLED_TOKENS)]
        if len(rows):
            self.sample = rows[-1, :SAMPLED_CHANNELS].clone()
        histogram = spike_histogram(rows, MAX_COUNT, impl=self.impl).double()
        self.histogram = histogram if self.histogram is None else self.histogram + histogram


def spike_encoders(model: nn.Module) -> dict[str, SpikeEncoder]:
    """Return the model's spike encoders that have a k, by module name."""
    return {name: encoder for name, encoder in _all_encoders(model).items() if encoder.k}


def set_spiking(
    model: nn.Module, config: SpikeConfig, *, num_sinks: int = 0, is_whole: bool = True
) -> None:
    """Give every encoder of a model what `config` says of its name.

    Args:
        num_sinks: rows before the tokens of a pass.
        is_whole: there are no other parts of the model, whose encoders patterns may mean.

    Raises:
        ValueError: a pattern of `k_by_input` matches no encoder.
    """
    encoders = _all_encoders(model)
    patterns = config.k_by_input or {}
    for pattern in patterns if is_whole else ():
        if not any(fnmatchcase(name, pattern) for name in encoders):
            raise ValueError(
                f"spike.k_by_input: {pattern!r} matches none of the inputs, which are "
                f"{_abridge(list(encoders))}"
            )
    for name, encoder in encoders.items():
        matches = [k for p, k in patterns.items() if fnmatchcase(name, p)]
        encoder.k = (matches or [config.k])[-1] if config.enabled else None
        encoder.rate_weight = config.rate_weight
        # Routed experts have rows by expert: those of sinks are not the first ones.
        encoder.num_sinks = 0 if ".experts." in name else num_sinks


def set_loss_scale(model: nn.Module, loss_scale: float) -> None:
    """Tell every encoder the weight of the auxiliary losses of one token."""
    for encoder in _all_encoders(model).values():
        encoder.loss_scale = loss_scale


class FiringRate(torch.autograd.Function):
    """Return x; backward, the gradient of a firing rate is added, as if it were part of the loss.

    The rate of a token is the mean over its channels of log2(1 + |x| / threshold), threshold being
    mean(|x|) / k: a smooth stand-in for the bits of a count, which has no gradient. Unlike that of
    counts, its gradient passes through the threshold: the rate does not see the scale of x, and
    falls only as few channels carry more of it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, k: float, weight: float, num_sinks: int) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.k, ctx.weight, ctx.num_sinks = k, weight, num_sinks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        size = x.detach().to(torch.promote_types(x.dtype, torch.float32)).abs()
        threshold = (size.mean(-1, keepdim=True) / ctx.k).clamp(MIN_THRESHOLD, MAX_THRESHOLD)
        slope = 1 / (threshold + size)
        through_threshold = (slope * size).mean(-1, keepdim=True) / (threshold * ctx.k)
        drate = (slope - through_threshold) * x.sign() / (x.shape[-1] * math.log(2))
        drate[..., : ctx.num_sinks, :] = 0
        return dout + (ctx.weight * drate).to(dout.dtype), None, None, None


def _all_encoders(model: nn.Module) -> dict[str, SpikeEncoder]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SpikeEncoder)}


def _abridge(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} ... {names[-1]}" if len(names) > 5 else shown or "none"
