"""Definition of the root-mean-square norm."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `ops.rms_norm.rms_norm`; differentiable by autograd."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.square().mean(-1, keepdim=True)
    return (wide / (mean_square + eps).sqrt() * weight).to(x.dtype)
