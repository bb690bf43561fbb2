"""Rotary embedding by a kernel in C++ for CPUs with AVX512-BF16, compiled when first used.

The kernel takes heads of a multiple of 32 channels; everything else is left to `torch_impl`.
"""

from typing import Any

import torch

from ops.cpp_build import load_kernel
from ops.rotary import torch_impl

HEAD_DIM_MULTIPLE = 32


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `ops.rotary.rotary`."""
    if x.shape[3] % HEAD_DIM_MULTIPLE:
        return torch_impl.rotary(x, cos, sin)
    out: torch.Tensor = _Rotary.apply(x, cos.float().contiguous(), sin.float().contiguous())
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return load_kernel("rotary").turn(x.contiguous(), cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, dout):  # type: ignore[no-untyped-def]
        return load_kernel("rotary").turn(dout.contiguous(), *ctx.saved_tensors, -1.0), None, None
