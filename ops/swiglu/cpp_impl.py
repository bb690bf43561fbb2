"""The gated unit by a kernel in C++ for CPUs with AVX512-BF16, compiled when first used.

The kernel takes a multiple of 16 elements; everything else is left to `torch_impl`.
"""

from typing import Any

import torch

from ops.cpp_build import load_kernel
from ops.swiglu import torch_impl

LANES = 16


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `ops.swiglu.swiglu`."""
    if gate.numel() % LANES:
        return torch_impl.swiglu(gate, up)
    out: torch.Tensor = _SwiGLU.apply(gate, up)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate, up):  # type: ignore[no-untyped-def]
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return load_kernel("swiglu").fwd(gate, up)

    @staticmethod
    def backward(ctx: Any, dout):  # type: ignore[no-untyped-def]
        return load_kernel("swiglu").bwd(dout.contiguous(), *ctx.saved_tensors)
