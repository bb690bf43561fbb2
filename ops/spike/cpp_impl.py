"""Spike counts by a kernel in C++ for CPUs with AVX-512, compiled when first used."""

import torch

from ops.cpp_build import load_kernel
from ops.spike import MAX_THRESHOLD, MIN_THRESHOLD
from ops.spike.straight_through import SpikeCount


def spike_count(x: torch.Tensor, k: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.spike.spike_count`."""
    count, threshold = SpikeCount.apply(x, k, spike_count_fwd, spike_count_bwd)
    return count, threshold


def spike_histogram(count: torch.Tensor, max_count: int) -> torch.Tensor:
    """See `ops.spike.spike_histogram`."""
    histogram: torch.Tensor = load_kernel("spike").histogram(count.contiguous(), max_count)
    return histogram


def spike_count_fwd(x: torch.Tensor, k: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return count and threshold."""
    fwd = load_kernel("spike").count_fwd
    count, threshold = fwd(x.contiguous(), k, MIN_THRESHOLD, MAX_THRESHOLD)
    return count, threshold


def spike_count_bwd(dcount: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Return dx."""
    dx: torch.Tensor = load_kernel("spike").count_bwd(dcount.contiguous(), threshold)
    return dx
