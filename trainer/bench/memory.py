"""The memory of a computation: the most that it allocates at once, and what it leaves behind."""

import itertools
from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


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
    return max(_trace(compute), default=0)


def held_bytes(compute: Callable[[], object]) -> int:
    """Return the bytes of tensors on the CPU that live on with what `compute` returns."""
    return (_trace(compute) or [0])[-1]


def saved_bytes(compute: Callable[[], torch.Tensor], model: nn.Module | None = None) -> int:
    """Return the bytes that `compute` keeps for its backward pass.

    Every storage counts once and whole, whatever part of it is a saved tensor; the parameters of
    `model` do not count.
    """
    own = set() if model is None else {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage
        return x.detach()  # an output that kept its own history would never be released

    with saved_tensors_hooks(pack, lambda x: x):
        compute()
    return sum(storage.nbytes() for place, storage in storages.items() if place not in own)


def _trace(compute: Callable[[], object]) -> list[int]:
    """Return the bytes of tensors alive after each allocation and release of `compute`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = compute()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return list(itertools.accumulate(event.nbytes() for event in events))
