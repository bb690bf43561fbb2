"""Rotary embedding in few passes over memory; the backward pass turns the other way."""

import torch

from ops.rotary.autograd import Rotary


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `ops.rotary.rotary`."""
    out: torch.Tensor = Rotary.apply(x, cos, sin, _turn)
    return out


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float) -> torch.Tensor:
    cos, sin = cos[:, None], sin[:, None]
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_a, out_b = out.chunk(2, -1)
    out_a.copy_((a * cos).addcmul_(b, sin, value=-direction))
    out_b.copy_((b * cos).addcmul_(a, sin, value=direction))
    return out
