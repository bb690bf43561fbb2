"""The most memory that a computation allocates at once, on a CPU or a GPU."""

from collections.abc import Callable

import torch


def peak_allocated_bytes(compute: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors alive at once that `compute` has allocated.

    On a CPU the profiler reports every allocation and release of PyTorch's allocator.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        compute()
        torch.accelerator.synchronize(device)
        return int(torch.accelerator.max_memory_allocated(device)) - int(before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        compute()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
