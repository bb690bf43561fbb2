"""The gated unit in portable PyTorch; the backward pass computes silu again, in place.

With f = silu:   dg = dy u f'(g),   du = dy f(g).
"""

from typing import Any

import torch
import torch.nn.functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `ops.swiglu.swiglu`."""
    out: torch.Tensor = _SwiGLU.apply(gate, up)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate, up):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        return swiglu_fwd(gate, up)

    @staticmethod
    def backward(ctx: Any, dout):  # type: ignore[no-untyped-def]
        return swiglu_bwd(dout, *ctx.saved_tensors)


def swiglu_fwd(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return the gated unit."""
    return F.silu(gate).mul_(up)


def swiglu_bwd(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up."""
    dgate = torch.ops.aten.silu_backward(dout * up, gate)
    return dgate, F.silu(gate).mul_(dout)
