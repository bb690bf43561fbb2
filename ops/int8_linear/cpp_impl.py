"""INT8 products by a kernel in C++ for CPUs with AMX, compiled when first used."""

import torch

from ops.cpp_build import load_kernel
from ops.int8_linear import torch_impl

GROUP_MULTIPLE = 64


def int8_linear(
    count: torch.Tensor,
    threshold: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """See `ops.int8_linear.int8_linear`."""
    if scale.shape[1] > 1 and group_size % GROUP_MULTIPLE:
        return torch_impl.int8_linear(count, threshold, weight, scale, group_size)
    inputs = (t.contiguous() for t in (count, threshold, weight, scale))
    out: torch.Tensor = load_kernel("int8_linear").int8_linear(*inputs, group_size)
    return out
