"""Spike count in portable PyTorch: nothing but the threshold is kept for the backward pass."""

import torch

from ops.spike import MAX_THRESHOLD, MIN_THRESHOLD


def spike_count(x: torch.Tensor, k: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.spike.spike_count`."""
    count, threshold = _SpikeCount.apply(x, k)
    return count, threshold


class _SpikeCount(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, k):  # type: ignore[no-untyped-def]
        acc = torch.promote_types(x.dtype, torch.float32)
        threshold = x.abs().mean(-1, keepdim=True, dtype=acc).div_(k)
        threshold.clamp_(MIN_THRESHOLD, MAX_THRESHOLD)
        count = (x / threshold).round_().to(x.dtype)  # float32 quotient for every input dtype
        ctx.save_for_backward(threshold)
        ctx.mark_non_differentiable(threshold)
        return count, threshold

    @staticmethod
    def backward(ctx, dcount, _):  # type: ignore[no-untyped-def]
        (threshold,) = ctx.saved_tensors
        return (dcount / threshold).to(dcount.dtype), None
