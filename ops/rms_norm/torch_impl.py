"""Root-mean-square norm in few passes over memory; keeps its input and one number per row.

With s the input, r = 1 / rms and y = s r w:
ds = r (w dy - s r^2 mean(s w dy)),   dw = sum over rows of s r dy.
"""

import torch

from ops.rms_norm.autograd import apply_rms_norm


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `ops.rms_norm.rms_norm`."""
    return apply_rms_norm(x, weight, eps, residual, rms_norm_fwd, rms_norm_bwd)


def rms_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the normalised tensor, what was normalised, and 1 / rms [..., 1] of its rows."""
    x = x if residual is None else x + residual
    acc = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=acc)
    rstd = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()
    return (x * rstd).mul_(weight).to(x.dtype), x, rstd


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
