"""The gradient of spike counts: that of x / threshold, the threshold being a constant."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


class SpikeCount(torch.autograd.Function):
    """Apply an implementation's forward and backward; only the threshold is kept between them."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, k: float, fwd: Any, bwd: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count, threshold = fwd(x, k)
        ctx.save_for_backward(threshold)
        ctx.mark_non_differentiable(threshold)
        ctx.bwd = bwd
        return count, threshold

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcount: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        (threshold,) = ctx.saved_tensors
        return ctx.bwd(dcount, threshold), None, None, None
