"""The gradients of the norm, without and with the residual add; implementations bring the passes.

fwd(x, weight, eps, residual) returns out, what was normalised and rstd; bwd(dout, dsummed, summed,
weight, rstd) the gradients of what was normalised, to which dsummed is added, and of the weight.
"""

from collections.abc import Callable
from typing import Any

import torch

Forward = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
Backward = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def apply_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    fwd: Forward,
    bwd: Backward,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the normalised tensor and x + residual, differentiable; None without residual."""
    if residual is None:
        out: torch.Tensor = _RMSNorm.apply(x, weight, eps, fwd, bwd)
        return out, None
    out, summed = _AddRMSNorm.apply(x, residual, weight, eps, fwd, bwd)
    return out, summed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, eps, fwd, bwd):  # type: ignore[no-untyped-def]
        out, normed, rstd = fwd(x, weight, eps, None)
        ctx.save_for_backward(normed, weight, rstd)
        ctx.bwd = bwd
        return out

    @staticmethod
    def backward(ctx: Any, dout):  # type: ignore[no-untyped-def]
        return *ctx.bwd(dout, None, *ctx.saved_tensors), None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, residual, weight, eps, fwd, bwd):  # type: ignore[no-untyped-def]
        out, summed, rstd = fwd(x, weight, eps, residual)
        ctx.save_for_backward(summed, weight, rstd)
        ctx.bwd = bwd
        return out, summed

    @staticmethod
    def backward(ctx: Any, dout, dsummed):  # type: ignore[no-untyped-def]
        dx, dweight = ctx.bwd(dout, dsummed, *ctx.saved_tensors)
        return dx, dx, dweight, None, None, None
