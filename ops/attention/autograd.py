"""The gradients of attention and of merge, whose passes each implementation brings."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ops.attention.settings import Settings

Tensors = tuple[torch.Tensor, ...]


class Attention(torch.autograd.Function):
    """Apply (q, k, v, settings, fwd, bwd); keeps the inputs, out and lse."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        settings: Settings,
        fwd: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        bwd: Callable[..., Tensors],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = fwd(q, k, v, settings)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings, ctx.bwd = settings, bwd
        ctx.set_materialize_grads(False)
        return out, lse.float()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 6
        q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        return *ctx.bwd(dout, dlse, q, k, v, out, lse, ctx.settings), None, None, None


class Merge(torch.autograd.Function):
    """Apply (out, lse, other_out, other_lse, fwd, bwd); keeps the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor,
        lse: torch.Tensor,
        other_out: torch.Tensor,
        other_lse: torch.Tensor,
        fwd: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        bwd: Callable[..., Tensors],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(out, lse, other_out, other_lse)
        ctx.bwd = bwd
        return fwd(out, lse, other_out, other_lse)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dmerged: torch.Tensor, dlse: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        return *ctx.bwd(dmerged, dlse, *ctx.saved_tensors), None, None
