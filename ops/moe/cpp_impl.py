"""Products of groups by a kernel in C++ for CPUs with AMX, compiled when first used.

The kernel is for matrices of multiples of 32; everything else is left to `torch_impl`.
"""

import torch

from ops.cpp_build import load_kernel
from ops.moe import torch_impl
from ops.moe.autograd import GroupedMatmul, Products

SIZE_MULTIPLE = 32


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """See `ops.moe.grouped_matmul`."""
    if any(size % SIZE_MULTIPLE for size in weight.shape[1:]):
        return torch_impl.grouped_matmul(x, weight, counts)
    kernel = load_kernel("moe")
    products = Products(kernel.fwd, kernel.dx, kernel.dweight)
    inputs = (t.contiguous() for t in (x, weight, counts))
    out: torch.Tensor = GroupedMatmul.apply(*inputs, products)
    return out
