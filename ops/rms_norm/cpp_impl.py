"""Root-mean-square norm by a kernel in C++ for CPUs with AVX512-BF16, compiled when first used.

The kernel takes rows of a multiple of 32 channels; everything else is left to `torch_impl`.
"""

from typing import Any

import torch

from ops.cpp_build import load_kernel
from ops.rms_norm import torch_impl

SIZE_MULTIPLE = 32


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `ops.rms_norm.rms_norm`."""
    if x.shape[-1] % SIZE_MULTIPLE:
        return torch_impl.rms_norm(x, weight, eps, residual)
    if residual is None:
        out: torch.Tensor = _RMSNorm.apply(x, weight, eps)
        return out, None
    out, summed = _AddRMSNorm.apply(x, residual, weight, eps)
    return out, summed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, eps):  # type: ignore[no-untyped-def]
        x = x.contiguous()
        out, rstd = load_kernel("rms_norm").fwd(x, None, None, _widen(weight), eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, dout):  # type: ignore[no-untyped-def]
        return *_backward(dout, None, *ctx.saved_tensors), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, residual, weight, eps):  # type: ignore[no-untyped-def]
        x, residual = x.contiguous(), residual.contiguous()
        summed = torch.empty_like(x)
        out, rstd = load_kernel("rms_norm").fwd(x, residual, summed, _widen(weight), eps)
        ctx.save_for_backward(summed, weight, rstd)
        return out, summed

    @staticmethod
    def backward(ctx: Any, dout, dsummed):  # type: ignore[no-untyped-def]
        dx, dweight = _backward(dout, dsummed.contiguous(), *ctx.saved_tensors)
        return dx, dx, dweight, None


def _backward(
    dout: torch.Tensor,
    dsummed: torch.Tensor | None,
    summed: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = load_kernel("rms_norm")
    dx, dweight = kernel.bwd(dout.contiguous(), dsummed, summed, _widen(weight), rstd)
    return dx, dweight.to(weight.dtype)


def _widen(weight: torch.Tensor) -> torch.Tensor:
    return weight.float().contiguous()
