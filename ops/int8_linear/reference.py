"""Definition: products of integers in int64, one group of inputs after the other."""

import torch


def int8_linear(
    count: torch.Tensor,
    threshold: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """See `ops.int8_linear.int8_linear`."""
    out = torch.zeros(len(count), len(weight), device=count.device)
    parts = zip(count.split(group_size, 1), weight.split(group_size, 1), scale.T, strict=True)
    for some, weights, scales in parts:
        out += (some.to(torch.int64) @ weights.to(torch.int64).T).to(torch.float32) * scales
    return out * threshold
