"""The gradient of the gated unit: keeps gate and up; implementations bring the passes."""

from collections.abc import Callable
from typing import Any

import torch

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Backward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class SwiGLU(torch.autograd.Function):
    """Apply (gate, up, fwd, bwd)."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, fwd: Forward, bwd: Backward
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.bwd = bwd
        return fwd(gate, up)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *ctx.bwd(dout, *ctx.saved_tensors), None, None
