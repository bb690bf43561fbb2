"""INT8 products in portable PyTorch: a product of int8 for every digit of the counts and group."""

import torch

from ops.int8_linear import LIMIT
from ops.spike.planes import split_into_planes
from ops.spike.torch_impl import spike_matmul


def int8_linear(
    count: torch.Tensor,
    threshold: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """See `ops.int8_linear.int8_linear`."""
    least, most = find_range(count)
    planes = list(split_into_planes(count, least, most))
    out = torch.zeros(len(count), len(weight), device=count.device)
    for group, scales in enumerate(scale.T):
        some = slice(group * group_size, (group + 1) * group_size)
        out += scales * sum_digits(
            [(factor, spike_matmul(plane[:, some], weight[:, some])) for factor, plane in planes]
        )
    return out * threshold


def sum_digits(products: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Return the float32 sum of int32 products, each times its factor, rounded once."""
    if len(products) == 1:
        return products[0][1].to(torch.float32)
    total = torch.zeros_like(products[0][1], dtype=torch.int64)
    for factor, product in products:
        total += factor * product.to(torch.int64)
    return total.to(torch.float32)


def find_range(count: torch.Tensor) -> tuple[int, int]:
    """Return the smallest and the largest count.

    Raises:
        ValueError: one is too large, or not finite.
    """
    if count.numel() == 0:
        return 0, 0
    least, most = (float(x) for x in count.aminmax())
    if not max(-least, most) < LIMIT:  # in this way round NaN is refused too
        raise ValueError(
            f"count holds {least} to {most}; integers below {LIMIT} in size fit, use a larger "
            "threshold"
        )
    return int(least), int(most)
