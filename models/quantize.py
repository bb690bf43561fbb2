"""W8A-spike: weights in INT8 with symmetric scales, multiplied by spike counts in exact integers.

Quantized are projections, routed experts, keys and values, if so configured the head, and the state
while decoding. The embedding is looked up, and norms, routers and the maps of single heads are
small: they stay as they are. Where spiking is off, a token's activation is integers times a
threshold all the same, such that its largest value becomes 127 or 32767.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from conf.schema.quantization import QuantizationConfig
from models.cache import TINY, KeyValueScales
from models.causal_lm import CausalLM, Head
from models.layers import Projection
from models.mixers.linear_attention import LinearAttention
from models.mixers.softmax_attention import SoftmaxAttention
from models.moe import Experts
from models.spiking import Activation, Spikes
from ops.int8_linear import MAX_WEIGHT, int8_linear
from ops.swiglu import swiglu

LARGEST = {"int8": 127, "int16": 32767}
CLIPS = tuple(1 - step / 40 for step in range(21))
"""Shares of a group's largest weight that become 127, tried in turn: 1 to 0.5."""
HEADROOM = 1.25
"""Of the INT8 range of keys and values beyond the largest that calibration has seen. Cutting the
few that come later costs more than the coarser grid."""
ROWS = 256
"""Tokens whose logits are there at a time."""


class IntegerWeight(nn.Module):
    """An INT8 matrix [out, in] with float32 scales [out, groups]."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, shape: torch.Size, config: QuantizationConfig, impl: str | None) -> None:
        super().__init__()
        self.config, self.impl = config, impl
        groups = -(-shape[1] // (config.group_size or shape[1]))
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(shape[0], groups))

    def multiply(self, x: Activation) -> torch.Tensor:
        """Return float32 [..., out] from [..., in]."""
        if not isinstance(x, Spikes):
            x = encode_integers(x, LARGEST[self.config.activations])
        size = self.config.group_size
        return int8_linear(
            x.count, x.threshold, self.weight, self.scale, group_size=size, impl=self.impl
        )

    @torch.no_grad()
    def take(self, weight: torch.Tensor, moment: torch.Tensor | None = None) -> None:
        """Round a float weight [out, in]; see `quantize_weight`."""
        self.weight, self.scale = quantize_weight(weight.float(), self.config.group_size, moment)


class IntegerProjection(IntegerWeight):
    """A `Projection` in INT8."""

    def __init__(self, old: Projection, config: QuantizationConfig, impl: str | None) -> None:
        super().__init__(old.weight.shape, config, impl)
        self.bias = old.bias

    def forward(self, x: Activation) -> torch.Tensor:
        dtype = x.count.dtype if isinstance(x, Spikes) else x.dtype
        out = self.multiply(x)
        return (out if self.bias is None else out + self.bias).to(dtype)


class IntegerHead(IntegerWeight):
    """A `Head` in INT8."""

    def __init__(self, old: Head, config: QuantizationConfig, impl: str | None) -> None:
        super().__init__(old.weight.shape, config, impl)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss and the number of labels that count."""
        parts = zip(x.flatten(0, -2).split(ROWS), labels.flatten().split(ROWS), strict=True)
        loss = sum(F.cross_entropy(self.logits(p), some, reduction="sum") for p, some in parts)
        return torch.as_tensor(loss), (labels != -100).sum()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., vocab] logits."""
        return self.multiply(x)


class IntegerExperts(nn.Module):
    """Routed `Experts` in INT8, one after the other."""

    def __init__(self, old: Experts, config: QuantizationConfig, impl: str | None) -> None:
        super().__init__()
        self.encode_in, self.encode_out, self.impl = old.encode_in, old.encode_out, old.ops.swiglu
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.ModuleList(IntegerWeight(weight.shape, config, impl) for weight in weights)
            for weights in old.weights
        )

    def forward(
        self, rows: torch.Tensor, counts: torch.Tensor, weights: None = None
    ) -> torch.Tensor:
        """See `Experts.forward`; the weights are its own."""
        parts = zip(rows.split(counts.tolist()), *self.weights, strict=True)
        return torch.cat([self._compute(*part) for part in parts])

    @property
    def weights(self) -> tuple[nn.ModuleList, ...]:
        """Those of gate, up and down, of all experts."""
        return self.gate_proj, self.up_proj, self.down_proj

    def _compute(
        self, x: torch.Tensor, gate: IntegerWeight, up: IntegerWeight, down: IntegerWeight
    ) -> torch.Tensor:
        encoded = self.encode_in(x)
        inner = swiglu(*(w.multiply(encoded).to(x.dtype) for w in (gate, up)), impl=self.impl)
        return down.multiply(self.encode_out(inner)).to(x.dtype)


def encode_integers(x: torch.Tensor, largest: int) -> Spikes:
    """Return an activation as integers up to `largest` in size, times a scale per token."""
    wide = x.float()
    threshold = (wide.abs().amax(-1, keepdim=True) / largest).clamp_min_(TINY)
    return Spikes((wide / threshold).round_(), threshold)


def quantize_weight(
    weight: torch.Tensor, group_size: int | None, moment: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the INT8 weight [out, in] and its float32 scales [out, groups].

    Args:
        weight: float32 [out, in].
        group_size: inputs that share a scale; None: all.
        moment: mean square of each input [in]. Given, each scale is the one among `CLIPS` of the
            least sum_i moment_i (w_i - scale q_i)^2, the error of the output; None: the largest
            weight is kept.
    """
    size = group_size or weight.shape[1]
    padding = -weight.shape[1] % size
    groups = F.pad(weight, (0, padding)).unflatten(1, (-1, size))  # [out, groups, size]
    largest = (groups.abs().amax(-1, keepdim=True) / MAX_WEIGHT).clamp_min_(TINY)
    scale = largest
    if moment is not None:
        importance = F.pad(moment, (0, padding)).view(-1, size)
        least = torch.full_like(largest, torch.inf)
        for clip in CLIPS:
            tried = clip * largest
            loss = ((groups - tried * _round(groups, tried)).square() * importance).sum(
                -1, keepdim=True
            )
            scale, least = torch.where(loss < least, tried, scale), torch.minimum(loss, least)
    codes = _round(groups, scale).to(torch.int8).flatten(1)[:, : weight.shape[1]]
    return codes.contiguous(), scale.squeeze(-1)


@dataclass
class Statistics:
    """What calibration saw.

    Attributes:
        moments: float32 [in], the mean square of each input of a projection, by its name.
        largest: float32 [2, H_kv, D], the largest key and value in size, by the name of the mixer.
            Rotated keys count by the length of the pair that is rotated together: which of the two
            channels is large depends on the position, and positions go beyond those of the samples.
    """

    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    largest: dict[str, torch.Tensor] = field(default_factory=dict)


@contextmanager
def observe(model: CausalLM, statistics: Statistics) -> Iterator[None]:
    """Inside, every pass of a float model adds to the statistics."""
    handles, mixers = [], []
    for name, module in model.named_modules():
        if isinstance(module, Projection | Head):
            handles.append(module.register_forward_pre_hook(_Moment(statistics, name)))
        elif isinstance(module, SoftmaxAttention):
            module.kv_scales = _Largest(statistics, name, module.config.rope_theta is not None)
            mixers.append(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for mixer in mixers:
            mixer.kv_scales = None


def apply_quantization(
    model: CausalLM, config: QuantizationConfig, statistics: Statistics | None = None
) -> None:
    """Turn a float model into an integer one, in place.

    Args:
        statistics: of calibration; None: the weights and scales are still to be loaded.
    """
    impl = model.ops.int8_linear
    for name, old in list(model.named_modules()):
        new: nn.Module | None = None
        if isinstance(old, Projection):
            new = IntegerProjection(old, config, impl)
        elif isinstance(old, Head) and config.head == "int8":
            new = IntegerHead(old, config, impl)
        elif isinstance(old, Experts):
            new = IntegerExperts(old, config, impl)
        elif isinstance(old, SoftmaxAttention) and config.kv_cache == "int8":
            old.kv_scales = KeyValueScales(old.config.num_kv_heads, old.config.head_dim)
            if statistics is not None:
                scales = (HEADROOM / LARGEST["int8"] * statistics.largest[name]).clamp_min_(TINY)
                old.kv_scales.key, old.kv_scales.value = scales.unbind()
        elif isinstance(old, LinearAttention):
            old.has_int8_state = config.state == "int8"
        if new is None:
            continue
        if statistics is not None:
            _take(new, old, None if config.clip == "none" else statistics.moments.get(name))
        model.set_submodule(name, new)


def _take(new: nn.Module, old: nn.Module, moment: torch.Tensor | None) -> None:
    """Round the weights of a module into the one that replaces it."""
    if isinstance(new, IntegerExperts):
        assert isinstance(old, Experts)
        for made, weights in zip(new.weights, old.weights, strict=True):
            for one, weight in zip(made, weights, strict=True):
                assert isinstance(one, IntegerWeight)
                one.take(weight)
    else:
        assert isinstance(new, IntegerWeight)
        assert isinstance(old, Projection | Head)
        new.take(old.matrix() if isinstance(old, Projection) else old.weight, moment)


def _round(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).round_().clamp_(-MAX_WEIGHT, MAX_WEIGHT)


class _Moment:
    """A hook that adds up the squares of a projection's inputs."""

    def __init__(self, statistics: Statistics, name: str) -> None:
        self.moments, self.name, self.rows = statistics.moments, name, 0

    def __call__(self, module: nn.Module, inputs: tuple[Activation, ...]) -> None:
        x = inputs[0]
        values = x.count.float() * x.threshold if isinstance(x, Spikes) else x.float()
        rows = values.flatten(0, -2)
        mean, count = rows.square().mean(0), self.rows + len(rows)
        old = self.moments.get(self.name, torch.zeros_like(mean))
        self.moments[self.name] = old + (mean - old) * len(rows) / count
        self.rows = count


class _Largest(KeyValueScales):
    """Notes the largest key and value per head and channel, and changes nothing."""

    def __init__(self, statistics: Statistics, name: str, is_rotated: bool) -> None:
        nn.Module.__init__(self)
        self.largest, self.name, self.is_rotated = statistics.largest, name, is_rotated

    def encode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lengths = torch.hypot(*k.float().chunk(2, -1)).repeat(1, 1, 1, 2) if self.is_rotated else k
        seen = torch.stack([x.float().abs().amax((0, 1)) for x in (lengths, v)])
        self.largest[self.name] = torch.maximum(seen, self.largest.get(self.name, seen))
        return q, k, v

    def decode(self, out: torch.Tensor) -> torch.Tensor:
        return out
