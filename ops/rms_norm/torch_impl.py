"""Root-mean-square norm in few passes over memory; keeps its input and one number per row.

With s the input, r = 1 / rms and y = s r w:
ds = r (w dy - s r^2 mean(s w dy)),   dw = sum over rows of s r dy.
"""

from typing import Any

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `ops.rms_norm.rms_norm`."""
    if residual is None:
        out: torch.Tensor = _RMSNorm.apply(x, weight, eps)
        return out, None
    out, summed = _AddRMSNorm.apply(x, residual, weight, eps)
    return out, summed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, eps):  # type: ignore[no-untyped-def]
        out, rstd = rms_norm_fwd(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, dout):  # type: ignore[no-untyped-def]
        return *rms_norm_bwd(dout, None, *ctx.saved_tensors), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, residual, weight, eps):  # type: ignore[no-untyped-def]
        summed = x + residual
        out, rstd = rms_norm_fwd(summed, weight, eps)
        ctx.save_for_backward(summed, weight, rstd)
        return out, summed

    @staticmethod
    def backward(ctx: Any, dout, dsummed):  # type: ignore[no-untyped-def]
        dx, dweight = rms_norm_bwd(dout, dsummed, *ctx.saved_tensors)
        return dx, dx, dweight, None


def rms_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised x and 1 / rms [..., 1] of its rows."""
    acc = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=acc)
    rstd = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()
    return (x * rstd).mul_(weight).to(x.dtype), rstd


def rms_norm_bwd(
    dout: torch.Tensor,
    dsummed: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x, to which `dsummed` is added, and of the weight."""
    size = x.shape[-1]
    wide = weight.to(rstd.dtype)
    product = (dout.to(rstd.dtype) * x).reshape(-1, size)
    dweight = (rstd.reshape(1, -1) @ product).view(size).to(weight.dtype)
    mean = (product @ wide).div_(size).view(rstd.shape)  # of x w dy, per row
    dx = dout * wide
    dx = dx.addcmul_(x.to(rstd.dtype), mean.mul_(rstd.square()), value=-1).mul_(rstd)
    if dsummed is not None:
        dx += dsummed
    return dx.to(x.dtype), dweight
