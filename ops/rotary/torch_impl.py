"""Rotary embedding in few passes over memory; the backward pass turns the other way."""

from typing import Any

import torch


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `ops.rotary.rotary`."""
    out: torch.Tensor = _Rotary.apply(x, cos, sin)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return rotary_fwd(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dout):  # type: ignore[no-untyped-def]
        return rotary_bwd(dout, *ctx.saved_tensors), None, None


def rotary_fwd(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return the rotated x."""
    return _turn(x, cos, sin, 1.0)


def rotary_bwd(dout: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return the gradient of x."""
    return _turn(dout, cos, sin, -1.0)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float) -> torch.Tensor:
    cos, sin = cos[:, None], sin[:, None]
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_a, out_b = out.chunk(2, -1)
    out_a.copy_((a * cos).addcmul_(b, sin, value=-direction))
    out_b.copy_((b * cos).addcmul_(a, sin, value=direction))
    return out
