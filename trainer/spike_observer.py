"""What the inputs of the projections are like when a model reads text: counts, codings, weights."""

from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

import torch
from torch import nn

from models.layers import HeadProjection, Projection
from models.moe import Experts
from models.quantize import IntegerExperts, IntegerProjection
from models.spiking import Activation, SpikeEncoder, Spikes
from ops.spike import spike_histogram, spike_statistics
from ops.spike.coding import UNARY

PROJECTIONS = (Projection, HeadProjection, IntegerProjection)

MOST_COUNT = 4095
"""Counts above this one are taken for it."""


@dataclass
class InputCounts:
    """The counts of one input of projections, or of several together.

    Attributes:
        positive: float64 [MOST_COUNT + 1], how often each count from 0 up occurred.
        negative: float64 [MOST_COUNT + 1], how often each size of a count below 0 did.
        squared_error: summed squares of what rounding to counts changed.
        squared: summed squares of the input.
        macs: multiply-accumulates that the projections spend on these counts.
        last: counts [channels] of the last token of the first pass.
    """

    positive: torch.Tensor = field(
        default_factory=lambda: torch.zeros(MOST_COUNT + 1, dtype=torch.float64)
    )
    negative: torch.Tensor = field(
        default_factory=lambda: torch.zeros(MOST_COUNT + 1, dtype=torch.float64)
    )
    squared_error: float = 0.0
    squared: float = 0.0
    macs: float = 0.0
    last: torch.Tensor | None = None

    @property
    def histogram(self) -> torch.Tensor:
        """float64 [MOST_COUNT + 1], how often each |count| occurred."""
        return self.positive + self.negative

    @property
    def relative_error(self) -> float:
        """Root of the mean square that rounding to counts changed, over that of the input."""
        return (self.squared_error / self.squared) ** 0.5 if self.squared else 0.0

    def statistics(self) -> dict[str, float]:
        """Return those of `ops.spike.spike_statistics` but for the histogram."""
        found = spike_statistics(self.histogram)
        return {key: value for key, value in found.items() if isinstance(value, float)}

    def spikes(self, coding: str, most: int) -> tuple[int, float]:
        """Return the steps that counts up to `most` in size need, and their spikes per channel.

        Codings without a sign stand for |count|, whose sign goes with the weight.
        """
        sizes = range(most + 1)
        steps, above = most, [float(n if coding in UNARY else n.bit_count()) for n in sizes]
        below = above
        if coding not in UNARY:
            steps = most.bit_length()
        if coding == "bitwise_twos_complement":
            steps += 1
            # -n is 2^steps - n, whose bits are those that n - 1 has not.
            below = [0.0, *(float(steps - n.bit_count()) for n in range(most))]
        counts = torch.stack([self.positive[: most + 1], self.negative[: most + 1]])
        spikes = (counts * torch.tensor([above, below], dtype=torch.float64)).sum()
        return max(1, steps), float(spikes / counts.sum().clamp(min=1))

    def most(self) -> int:
        """Return the size of the largest count."""
        found = self.histogram.nonzero()
        return int(found.max()) if len(found) else 0

    def add(self, other: "InputCounts") -> None:
        """Take the counts of another input as well."""
        self.positive = self.positive + other.positive
        self.negative = self.negative + other.negative
        self.squared_error += other.squared_error
        self.squared += other.squared
        self.macs += other.macs


class SpikeObserver:
    """While it is entered, every pass of a model adds to the counts of its inputs, by name.

    Attributes:
        inputs: by the name of the encoder, those that are spiked.
        dense_macs: multiply-accumulates with float weights whose input is not spiked.
        integer_macs: the same with INT8 weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._encoded: tuple[str, Activation] | None = None
        self.inputs: dict[str, InputCounts] = {}
        self.dense_macs = self.integer_macs = 0.0

    def __enter__(self) -> "SpikeObserver":
        for name, module in self._modules.items():
            if isinstance(module, SpikeEncoder):
                self._handles.append(module.register_forward_hook(partial(self._observe, name)))
            elif isinstance(module, PROJECTIONS):
                self._handles.append(module.register_forward_pre_hook(self._weigh))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._encoded = [], None

    @property
    def macs(self) -> float:
        """All multiply-accumulates of projections."""
        spiked = sum(counts.macs for counts in self.inputs.values())
        return spiked + self.dense_macs + self.integer_macs

    def _observe(
        self, name: str, encoder: nn.Module, inputs: tuple[torch.Tensor, ...], out: Activation
    ) -> None:
        assert isinstance(encoder, SpikeEncoder), "hooks are on encoders"
        self._encoded = name, out
        if isinstance(out, Spikes):
            self._count(name, inputs[0], out, encoder.num_sinks)
        parent, _, role = name.rpartition(".")
        experts = self._modules[parent]
        weights = _expert_weights(experts)
        if weights:  # they multiply without projections
            macs = sum(weights[:2]) if role == "encode_in" else weights[2]
            self._add_macs(macs, out, isinstance(experts, IntegerExperts))

    def _count(self, name: str, x: torch.Tensor, out: Spikes, num_sinks: int) -> None:
        seen = self.inputs.setdefault(name, InputCounts())
        count, threshold = out.count[..., num_sinks:, :], out.threshold[..., num_sinks:, :]
        x = x[..., num_sinks:, :]
        below = spike_histogram(count.clamp(max=0), MOST_COUNT).cpu().double()
        below[0] = 0
        sizes = spike_histogram(count, MOST_COUNT).cpu().double()
        seen.positive += sizes - below
        seen.negative += below
        seen.squared_error += float((count.float() * threshold - x).square().sum())
        seen.squared += float(x.float().square().sum())
        if seen.last is None and count.numel():
            seen.last = count.reshape(-1, count.shape[-1])[-1].detach().clone()

    def _weigh(self, projection: nn.Module, inputs: tuple[Activation, ...]) -> None:
        assert isinstance(projection, PROJECTIONS), "hooks are on projections"
        is_integer = isinstance(projection, IntegerProjection)
        self._add_macs(projection.weight.numel(), inputs[0], is_integer)

    def _add_macs(self, weights: int, x: Activation, is_integer: bool) -> None:
        values = x.count if isinstance(x, Spikes) else x
        macs = weights * (values.numel() // max(1, values.shape[-1]))
        if isinstance(x, Spikes) and self._encoded is not None and self._encoded[1] is x:
            self.inputs[self._encoded[0]].macs += macs
        elif is_integer:
            self.integer_macs += macs
        else:
            self.dense_macs += macs


def _expert_weights(experts: nn.Module) -> list[int]:
    """Return the weights of gate, up and down of one routed expert; none of another module."""
    if isinstance(experts, Experts):
        return [weight[0].numel() for weight in experts.weights]
    if isinstance(experts, IntegerExperts):
        return [next(side.buffers()).numel() for side in experts.weights]
    return []
