"""Spiking of a projection's input (spec: eq. 19-21 of arXiv:2509.05276) and its statistics."""

from dataclasses import dataclass

import torch
from torch import nn

from conf.schema import SpikeConfig
from ops.spike import MAX_COUNT, spike_count, spike_histogram
from parallel.recompute import is_backward

SAMPLED_TOKENS = 128
"""Tokens of a forward pass, evenly spaced, that statistics are taken from."""


@dataclass(frozen=True)
class Spikes:
    """An activation as counts: it stands for `count * threshold`."""

    count: torch.Tensor
    """[..., channels], signed integers in the compute dtype."""
    threshold: torch.Tensor
    """[..., 1] float32."""


Activation = torch.Tensor | Spikes


class SpikeEncoder(nn.Module):
    """Turn the input of one or several projections into spikes; the identity when disabled."""

    def __init__(self, config: SpikeConfig, impl: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.impl = impl
        self.num_sinks = 0
        """First rows of a training pass that statistics leave out: every rank has the same ones."""
        self.histogram: torch.Tensor | None = None
        """float64 [MAX_COUNT + 1]: how often each |count| occurred since `take_histogram`."""

    def forward(self, x: torch.Tensor) -> Activation:
        if not self.config.enabled:
            return x
        count, threshold = spike_count(x, self.config.k, impl=self.impl)
        if self.training and not is_backward():  # what is recomputed was seen before
            self._observe(count.detach()[..., self.num_sinks :, :])
        return Spikes(count, threshold)

    def take_histogram(self) -> torch.Tensor:
        """Return the counts seen since the last call and start afresh."""
        assert self.histogram is not None, "the encoder has not run in training mode"
        histogram, self.histogram = self.histogram, None
        return histogram

    def _observe(self, count: torch.Tensor) -> None:
        rows = count.reshape(-1, count.shape[-1])
        rows = rows[:: max(1, rows.shape[0] // SAMPLED_TOKENS)]
        histogram = spike_histogram(rows, MAX_COUNT, impl=self.impl).double()
        self.histogram = histogram if self.histogram is None else self.histogram + histogram


def spike_encoders(model: nn.Module) -> dict[str, SpikeEncoder]:
    """Return the model's enabled spike encoders by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SpikeEncoder) and module.config.enabled
    }
