"""Root-mean-square norm by a kernel in C++ for CPUs with AVX512-BF16, compiled when first used.

The kernel takes rows of a multiple of 32 channels; everything else is left to `torch_impl`.
"""

import torch

from ops.cpp_build import load_kernel
from ops.rms_norm import torch_impl
from ops.rms_norm.autograd import apply_rms_norm

SIZE_MULTIPLE = 32


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `ops.rms_norm.rms_norm`."""
    if x.shape[-1] % SIZE_MULTIPLE:
        return torch_impl.rms_norm(x, weight, eps, residual)
    return apply_rms_norm(x, weight, eps, residual, rms_norm_fwd, rms_norm_bwd)


def rms_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the normalised tensor, what was normalised, and 1 / rms of its rows."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    summed = None if residual is None else torch.empty_like(x)
    out, rstd = load_kernel("rms_norm").fwd(x, residual, summed, _widen(weight), eps)
    return out, x if summed is None else summed, rstd


def rms_norm_bwd(
    dout: torch.Tensor,
    dsummed: torch.Tensor | None,
    summed: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of what was normalised, with `dsummed` added, and of the weight."""
    dsummed = None if dsummed is None else dsummed.contiguous()
    bwd = load_kernel("rms_norm").bwd
    dx, dweight = bwd(dout.contiguous(), dsummed, summed, _widen(weight), rstd)
    return dx, dweight.to(weight.dtype)


def _widen(weight: torch.Tensor) -> torch.Tensor:
    return weight.float().contiguous()
