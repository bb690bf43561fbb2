"""Rotary embedding by a kernel in C++ for CPUs with AVX512-BF16, compiled when first used.

The kernel takes heads of a multiple of 32 channels; everything else is left to `torch_impl`.
"""

import torch

from ops.cpp_build import load_kernel
from ops.rotary import torch_impl
from ops.rotary.autograd import Rotary

HEAD_DIM_MULTIPLE = 32


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `ops.rotary.rotary`."""
    if x.shape[3] % HEAD_DIM_MULTIPLE:
        return torch_impl.rotary(x, cos, sin)
    out: torch.Tensor = Rotary.apply(x, cos.float().contiguous(), sin.float().contiguous(), _turn)
    return out


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float) -> torch.Tensor:
    turned: torch.Tensor = load_kernel("rotary").turn(x.contiguous(), cos, sin, direction)
    return turned
