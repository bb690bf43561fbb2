"""Definition of the root-mean-square norm."""

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.rms_norm.rms_norm`; differentiable by autograd."""
    summed = x if residual is None else x + residual
    wide = summed.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.square().mean(-1, keepdim=True)
    return (wide / (mean_square + eps).sqrt() * weight).to(x.dtype), summed
