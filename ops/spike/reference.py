"""Definitions: the count is differentiable by autograd through a detached remainder."""

import torch

from ops.spike import MAX_THRESHOLD, MIN_THRESHOLD
from ops.spike.coding import UNARY


def spike_count(x: torch.Tensor, k: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.spike.spike_count`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    threshold = (wide.abs().mean(-1, keepdim=True) / k).clamp(MIN_THRESHOLD, MAX_THRESHOLD)
    threshold = threshold.detach()
    ratio = wide / threshold
    remainder = (ratio.round() - ratio).detach().nan_to_num(0.0)  # of infinity: none
    return (ratio + remainder).to(x.dtype), threshold


def encode(count: torch.Tensor, coding: str, num_steps: int) -> torch.Tensor:
    """See `ops.spike.encode`."""
    count = count.to(torch.int64)
    step = torch.arange(num_steps, device=count.device).view(-1, *[1] * count.dim())
    if coding in UNARY:
        train = (step < count.abs()) * count.sign()
    elif coding == "bitwise_twos_complement":
        train = count // 2**step % 2  # floors, as two's complement does
    else:
        train = count.abs() // 2**step % 2 * count.sign()
    return train.to(torch.int8)


def decode(train: torch.Tensor, coding: str, weights: list[int]) -> torch.Tensor:
    """See `ops.spike.decode`; `weights` are those of the steps."""
    factor = torch.tensor(weights, device=train.device).view(-1, *[1] * (train.dim() - 1))
    return (train.to(torch.int64) * factor).sum(0)


def spike_histogram(count: torch.Tensor, max_count: int) -> torch.Tensor:
    """See `ops.spike.spike_histogram`."""
    sizes = count.double().abs().nan_to_num(posinf=max_count).clamp(max=max_count).flatten()
    return torch.stack([(sizes == n).sum() for n in range(max_count + 1)])


def spike_matmul(plane: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply int8 [rows, in] by int8 [out, in]."""
    # Sums below 2^53 are exact in float64, whose products exist on every device.
    return (plane.double() @ weight.double().T).to(torch.int32)
