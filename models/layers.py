"""Norm, projection and FFN: the parts that every layer shares.

Parameters are float32; a module computes in the dtype of its input, statistics in float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from conf.schema import FFNConfig, OpsConfig, SpikeConfig
from models.spiking import Activation, SpikeEncoder, Spikes
from ops.rms_norm import rms_norm
from ops.swiglu import swiglu
from parallel.recompute import rebuilt
from parallel.sequence import SequenceContext


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, impl: str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.impl = impl

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, impl=self.impl)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + residual, normalised and as it is."""
        return rms_norm(x, self.weight, self.eps, residual=residual, impl=self.impl)


class WeightAdapter(nn.Module, ABC):
    """Puts another matrix in place of a projection's weight."""

    @abstractmethod
    def merge(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the matrix that stands for a weight [out, in]."""

    @abstractmethod
    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return `multiply` of x [..., in] and that matrix."""


class Projection(nn.Module):
    """A linear map of an activation or of spikes: W x + b, or threshold (W count) + b."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.adapter: WeightAdapter | None = None

    def matrix(self) -> torch.Tensor:
        """Return what is multiplied by, [out, in]: the weight, with the adapter in it."""
        return self.weight if self.adapter is None else self.adapter.merge(self.weight)

    def forward(self, x: Activation) -> torch.Tensor:
        values = x.count if isinstance(x, Spikes) else x
        if self.adapter is None:
            out = multiply(values, self.weight.to(values.dtype))
        else:
            out = self.adapter(values, self.weight)
        if isinstance(x, Spikes):
            out = out * x.threshold.to(out.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def reset(self, std: float) -> None:
        """Draw the weight from N(0, std) and clear the bias."""
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class HeadProjection(nn.Module):
    """A linear map of each head for itself: [..., H * D_in] -> [..., H, D_out]."""

    def __init__(self, num_heads: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, out_features, in_features))

    def forward(self, x: Activation) -> torch.Tensor:
        values = x.count if isinstance(x, Spikes) else x
        heads = values.unflatten(-1, (self.weight.shape[0], -1))
        out = torch.einsum("...hi,hoi->...ho", heads, self.weight.to(values.dtype))
        return out * x.threshold.to(out.dtype)[..., None] if isinstance(x, Spikes) else out


class FFN(nn.Module, ABC):
    """What a layer does with each token for itself."""

    kind = "ffn"
    """Name in reports."""

    @abstractmethod
    def forward(self, x: torch.Tensor, context: SequenceContext | None = None) -> torch.Tensor:
        """Return [1, T, E] from [1, T, E]; without a context this rank does so alone."""

    @abstractmethod
    def reset(self, std: float, out_std: float) -> None:
        """Draw initial weights; `out_std` for the projections that write to the residual."""

    @abstractmethod
    def active_weights(self) -> int:
        """Return the weights that multiply each token."""

    def computed_weights(self) -> tuple[float, float]:
        """Return the weights that multiply each token, padding included, and those that do so again
        in the backward pass.
        """
        return self.active_weights(), 0.0


class SwiGLU(FFN):
    """down(silu(gate x) * up x) (arXiv:2002.05202).

    `recomputes_product`: what `down` multiplies is computed again in the backward pass.
    """

    recomputes_product = False

    def __init__(
        self, config: FFNConfig, hidden_size: int, spike: SpikeConfig, ops: OpsConfig
    ) -> None:
        super().__init__()
        self.impl = ops.swiglu
        self.encode_in = SpikeEncoder(spike, ops.spike)
        self.encode_out = SpikeEncoder(spike, ops.spike)
        self.gate_proj = Projection(hidden_size, config.intermediate_size)
        self.up_proj = Projection(hidden_size, config.intermediate_size)
        self.down_proj = Projection(config.intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor, context: SequenceContext | None = None) -> torch.Tensor:
        encoded = self.encode_in(x)
        gate, up = self.gate_proj(encoded), self.up_proj(encoded)
        return project_product(
            lambda: self.encode_out(swiglu(gate, up, impl=self.impl)),
            self.down_proj,
            recompute=self.recomputes_product,
        )

    def reset(self, std: float, out_std: float) -> None:
        self.gate_proj.reset(std)
        self.up_proj.reset(std)
        self.down_proj.reset(out_std)

    def active_weights(self) -> int:
        return projection_weights(self)


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x weight^T, [..., out]; one row alone as a vector, which costs half on a CPU."""
    if x.numel() == x.shape[-1]:
        return torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def project_product(
    product: Callable[[], Activation],
    down: Callable[[Activation], torch.Tensor],
    *,
    recompute: bool,
) -> torch.Tensor:
    """Return down(product()); with `recompute` the product is not kept, but computed again."""

    def values(inner: Activation) -> torch.Tensor:
        return inner.count if isinstance(inner, Spikes) else inner

    inner = product()
    if not recompute:
        return down(inner)
    with rebuilt(values(inner), lambda: values(product())):
        return down(inner)


def projection_weights(module: nn.Module) -> int:
    """Return the weights of all projections in a module; biases and norms count nothing."""
    kinds = Projection | HeadProjection
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, kinds))
