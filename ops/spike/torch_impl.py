"""Spikes in portable PyTorch: nothing but the threshold is kept for the backward pass."""

import torch
from torch.nn import functional as F

from ops.spike import MAX_THRESHOLD, MIN_THRESHOLD
from ops.spike.coding import UNARY
from ops.spike.straight_through import SpikeCount

EXACT_INPUTS = 1024  # of a float32 sum: 1024 x 128 x 128 is 2^24


def spike_count(x: torch.Tensor, k: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.spike.spike_count`."""
    count, threshold = SpikeCount.apply(x, k, spike_count_fwd, spike_count_bwd)
    return count, threshold


def encode(count: torch.Tensor, coding: str, num_steps: int) -> torch.Tensor:
    """See `ops.spike.encode`."""
    count = count.to(_find_narrowest(num_steps.bit_length() if coding in UNARY else num_steps))
    train = torch.empty(num_steps, *count.shape, dtype=torch.int8, device=count.device)
    size, sign = count.abs(), count.sign().to(torch.int8)
    for t in range(num_steps):
        if coding in UNARY:
            torch.mul((size > t).view(torch.int8), sign, out=train[t])
        elif coding == "bitwise_twos_complement":
            train[t] = count >> t & 1
        else:
            torch.mul((size >> t & 1).to(torch.int8), sign, out=train[t])
    return train


def decode(train: torch.Tensor, coding: str, weights: list[int]) -> torch.Tensor:
    """See `ops.spike.decode`; `weights` are those of the steps."""
    dtype = _find_narrowest(sum(abs(weight) for weight in weights).bit_length())
    count = torch.zeros(train.shape[1:], dtype=dtype, device=train.device)
    for step, weight in zip(train, weights, strict=True):
        count.add_(step.to(dtype), alpha=weight)
    return count.to(torch.int64)


def spike_histogram(count: torch.Tensor, max_count: int) -> torch.Tensor:
    """See `ops.spike.spike_histogram`."""
    sizes = count.float().abs().nan_to_num_(posinf=max_count).clamp_(max=max_count)
    return torch.bincount(sizes.int().flatten(), minlength=max_count + 1)


def spike_matmul(plane: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply int8 [rows, in] by int8 [out, in]."""
    device = plane.device.type
    # Without this instruction sums of two products saturate at 16 bits (pytorch issue 136746).
    if device == "cuda" or (device == "cpu" and torch.cpu._is_vnni_supported()):
        # CUDA asks for more than 16 rows and for multiples of 8; CPUs take the strides of a single
        # row or column at their word (pytorch issue 195066).
        left, right = _pad(plane, max(17, len(plane))), _pad(weight, (len(weight) + 7) // 8 * 8)
        return torch._int_mm(left, right.T)[: len(plane), : len(weight)].contiguous()
    total = plane.new_zeros(len(plane), len(weight), dtype=torch.int32)
    for some in torch.arange(plane.shape[1], device=plane.device).split(EXACT_INPUTS):
        total += (plane[:, some].float() @ weight[:, some].float().T).to(torch.int32)
    return total


def spike_count_fwd(x: torch.Tensor, k: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return count and threshold."""
    wide = torch.promote_types(x.dtype, torch.float32)
    threshold = x.abs().mean(-1, keepdim=True, dtype=wide).div_(k)
    threshold.clamp_(MIN_THRESHOLD, MAX_THRESHOLD)
    count = (x / threshold).round_().to(x.dtype)  # float32 quotient for every input dtype
    return count, threshold


def spike_count_bwd(dcount: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Return dx."""
    return (dcount / threshold).to(dcount.dtype)


def _pad(x: torch.Tensor, rows: int) -> torch.Tensor:
    missing = rows - len(x), -x.shape[1] % 8
    return F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x.contiguous()


def _find_narrowest(bits: int) -> torch.dtype:
    """Return the type of integers, negative ones among them, whose sizes have so many bits."""
    wide_enough = (d for d in (torch.int8, torch.int16, torch.int32) if bits < torch.iinfo(d).bits)
    return next(wide_enough, torch.int64)
