"""Norm, projection, rotary embedding and FFN: the parts that every layer shares.

Parameters are float32; a module computes in the dtype of its input, statistics in float32.
"""

import torch
import torch.nn.functional as F
from torch import nn

from conf.schema import FFNConfig, SpikeConfig
from models.spiking import Activation, SpikeEncoder, Spikes


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return F.rms_norm(wide, self.weight.shape, self.weight, self.eps).to(x.dtype)


class Projection(nn.Module):
    """A linear map of an activation or of spikes: W x + b, or threshold (W count) + b."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Activation) -> torch.Tensor:
        if isinstance(x, Spikes):
            out = F.linear(x.count, self.weight.to(x.count.dtype))
            out = out * x.threshold.to(out.dtype)
        else:
            out = F.linear(x, self.weight.to(x.dtype))
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def reset(self, std: float) -> None:
        """Draw the weight from N(0, std) and clear the bias."""
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def rotary(x: torch.Tensor, position_ids: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate halves of each head by the token's position (arXiv:2104.09864).

    Args:
        x: [B, T, H, D].
        position_ids: int64 [T].
        theta: base of the wave lengths.
    """
    half = x.shape[-1] // 2
    exponent = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angle = position_ids[:, None].float() * theta**-exponent  # [T, D / 2]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half].float(), x[..., half:].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (arXiv:2002.05202)."""

    def __init__(
        self, config: FFNConfig, hidden_size: int, spike: SpikeConfig, impl: str | None
    ) -> None:
        super().__init__()
        self.encode_in = SpikeEncoder(spike, impl)
        self.encode_out = SpikeEncoder(spike, impl)
        self.gate_proj = Projection(hidden_size, config.intermediate_size)
        self.up_proj = Projection(hidden_size, config.intermediate_size)
        self.down_proj = Projection(config.intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        encoded = self.encode_in(x)
        inner = F.silu(self.gate_proj(encoded)) * self.up_proj(encoded)
        return self.down_proj(self.encode_out(inner))

    def reset(self, std: float, out_std: float) -> None:
        self.gate_proj.reset(std)
        self.up_proj.reset(std)
        self.down_proj.reset(out_std)
