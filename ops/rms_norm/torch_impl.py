"""Root-mean-square norm in few passes over memory; keeps its input and one number per row.

With r = 1 / rms and y = x r w:   dx = r (w dy - x r^2 mean(x w dy)),   dw = sum over rows x r dy.
"""

from typing import Any

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `ops.rms_norm.rms_norm`."""
    out: torch.Tensor = _RMSNorm.apply(x, weight, eps)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, eps):  # type: ignore[no-untyped-def]
        acc = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=acc)
        rstd = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dout):  # type: ignore[no-untyped-def]
        x, weight, rstd = ctx.saved_tensors
        size = x.shape[-1]
        wide = weight.to(rstd.dtype)
        product = (dout.to(rstd.dtype) * x).view(-1, size)
        dweight = (rstd.view(1, -1) @ product).view(size).to(weight.dtype)
        mean = (product @ wide).div_(size).view_as(rstd)  # of x w dy, per row
        dx = dout * wide
        dx = dx.addcmul_(x.to(rstd.dtype), mean.mul_(rstd.square()), value=-1).mul_(rstd)
        return dx.to(x.dtype), dweight, None
