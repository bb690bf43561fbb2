"""Definition of the spike count, differentiable by autograd through a detached remainder."""

import torch

from ops.spike import MAX_THRESHOLD, MIN_THRESHOLD


def spike_count(x: torch.Tensor, k: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.spike.spike_count`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    threshold = (wide.abs().mean(-1, keepdim=True) / k).clamp(MIN_THRESHOLD, MAX_THRESHOLD)
    threshold = threshold.detach()
    ratio = wide / threshold
    return (ratio + (ratio.round() - ratio).detach()).to(x.dtype), threshold
