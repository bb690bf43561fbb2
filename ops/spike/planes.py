"""Counts as int8 planes, the operands of integer products."""

from collections.abc import Iterator

import torch

from ops.spike.coding import find_span

LEAST, MOST = -128, 127
LARGEST_SUM = 2**31 - 1


def check_operands(count: torch.Tensor, weight: torch.Tensor) -> tuple[int, int]:
    """Return bounds of the counts.

    Raises:
        ValueError: the product of counts and weights is not defined, or may exceed int32.
    """
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}; give int8 [out, in]")
    if count.dim() < 1 or count.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"count has shape {list(count.shape)}; its last dim must be the {weight.shape[1]} "
            "inputs of weight"
        )
    if count.device != weight.device:
        raise ValueError(f"count is on {count.device}, weight on {weight.device}; move one")
    is_narrow = count.dtype == torch.int8
    least, most = (LEAST, MOST) if is_narrow else find_span(count)
    largest = max(-least, most)
    if count.shape[-1] * -LEAST * largest > LARGEST_SUM:
        row = float(count.double().abs().sum(-1).max()) if count.numel() else 0.0
        if row * -LEAST > LARGEST_SUM:
            raise ValueError(
                f"counts up to {largest} and rows of counts that sum up to {row:.0f} may exceed "
                f"int32; rows that sum to {LARGEST_SUM // -LEAST} fit, use a larger threshold"
            )
    return least, most


def split_into_planes(
    count: torch.Tensor, least: int, most: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (factor, plane), planes int8 [rows, in], with sum(factor * plane) the counts.

    The planes are the signed digits of counts from `least` to `most` in base 256.
    """
    rest = count.reshape(-1, count.shape[-1])
    if least >= LEAST and most <= MOST:
        yield 1, rest.to(torch.int8)
        return
    # No count is above 2^24, or a sum of products could exceed int32.
    rest, factor = rest.to(torch.int32), 1
    while least < LEAST or most > MOST:
        above = (rest + 128) >> 8
        yield factor, (rest - (above << 8)).to(torch.int8)
        rest, factor = above, factor << 8
        least, most = (least + 128) >> 8, (most + 128) >> 8
    yield factor, rest.to(torch.int8)
