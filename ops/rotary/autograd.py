"""The gradient of the rotary embedding: turning the other way, as each implementation does it."""

from collections.abc import Callable
from typing import Any

import torch

Turn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(x, cos, sin, direction) -> x rotated by direction (1 or -1) times the angles."""


class Rotary(torch.autograd.Function):
    """Apply (x, cos, sin, turn); keeps the table alone."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turn: Turn
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.turn = turn
        return turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.turn(dout, *ctx.saved_tensors, -1.0), None, None, None
