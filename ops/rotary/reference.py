"""Definition of the rotary embedding: a complex rotation of each pair of channels."""

import torch


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `ops.rotary.rotary`; differentiable by autograd."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(wide).chunk(2, -1)
    turned = torch.complex(a, b) * torch.complex(cos.to(wide), sin.to(wide))[:, None]
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)
