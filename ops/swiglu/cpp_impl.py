"""The gated unit by a kernel in C++ for CPUs with AVX512-BF16, compiled when first used.

The kernel takes a multiple of 16 elements; everything else is left to `torch_impl`.
"""

import torch

from ops.cpp_build import load_kernel
from ops.swiglu import torch_impl
from ops.swiglu.autograd import SwiGLU

LANES = 16


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `ops.swiglu.swiglu`."""
    if gate.numel() % LANES:
        return torch_impl.swiglu(gate, up)
    out: torch.Tensor = SwiGLU.apply(gate, up, swiglu_fwd, swiglu_bwd)
    return out


def swiglu_fwd(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return the gated unit."""
    out: torch.Tensor = load_kernel("swiglu").fwd(gate.contiguous(), up.contiguous())
    return out


def swiglu_bwd(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up."""
    inputs = (x.contiguous() for x in (dout, gate, up))
    dgate, dup = load_kernel("swiglu").bwd(*inputs)
    return dgate, dup
