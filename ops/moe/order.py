"""The order of rows sorted by expert, made on the device without waiting for it."""

import torch


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return order [N k] and counts [G], int64, of experts [N, k]; see `ops.moe.permute`."""
    sorted_experts, order = experts.flatten().sort(stable=True)
    # Not bincount, which waits for the largest value.
    bounds = torch.arange(num_experts + 1, device=experts.device)
    return order, torch.searchsorted(sorted_experts, bounds).diff()


def invert(order: torch.Tensor, k: int) -> torch.Tensor:
    """Return the sorted row of each token and slot, int64 [N, k]."""
    rows = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, rows).view(-1, k)
