"""The gated unit in portable PyTorch; the backward pass computes silu again, in place.

With f = silu:   dg = dy u f'(g),   du = dy f(g).
"""

import torch
import torch.nn.functional as F

from ops.swiglu.autograd import SwiGLU


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `ops.swiglu.swiglu`."""
    out: torch.Tensor = SwiGLU.apply(gate, up, swiglu_fwd, swiglu_bwd)
    return out


def swiglu_fwd(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return the gated unit."""
    return F.silu(gate).mul_(up)


def swiglu_bwd(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up."""
    dgate = torch.ops.aten.silu_backward(dout * up, gate)
    return dgate, F.silu(gate).mul_(dout)
