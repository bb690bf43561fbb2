"""Definition of the gated unit."""

import torch


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `ops.swiglu.swiglu`; differentiable by autograd."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    x = gate.to(wide)
    return (x * torch.sigmoid(x) * up.to(wide)).to(gate.dtype)
