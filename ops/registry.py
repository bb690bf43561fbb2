"""Choose an operator's implementation by device, dtype and pin, and say what was chosen and why.

Each operator owns a constant table of `Implementation` rows in order of preference; nothing
registers itself, and an exception inside an implementation is never a reason to try the next.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

logger = logging.getLogger(__name__)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Implementation(NamedTuple):
    """One way to compute an operator."""

    name: str
    """reference, torch, cpp, triton or a vendor's name."""
    module: str
    """Holds the operator's functions under their names; imported when first chosen."""
    devices: tuple[str, ...] | None
    """Device types it runs on; None: every one PyTorch knows."""
    dtypes: tuple[torch.dtype, ...]
    requires: str | None = None
    """`module:function` that is given the device type and returns why the implementation cannot
    run on it here, or None where it can."""
    on_request: tuple[str, ...] = ()
    """Device types it runs on as well, but is never chosen for unless pinned."""


def choose(
    function: str,
    table: Sequence[Implementation],
    tensor: torch.Tensor,
    impl: str | None = None,
) -> Callable[..., Any]:
    """Return the implementation of a function that suits `tensor`.

    Args:
        function: `operator.function`, as in "cross_entropy.linear_cross_entropy"; the operator
            is what a config pins.
        table: its implementations, preferred first.
        tensor: an input, whose device and dtype decide.
        impl: pin one by name; None or "auto" takes the first row that fits.

    Raises:
        ValueError: the pinned implementation does not exist or cannot run here.
    """
    op, _, name = function.partition(".")
    chosen, why = explain(op, tuple(table), tensor.device.type, tensor.dtype, impl)
    _announce(op, chosen, why)
    return _load(next(row.module for row in table if row.name == chosen), name)


@functools.cache
def explain(
    op: str,
    table: tuple[Implementation, ...],
    device: str,
    dtype: torch.dtype,
    impl: str | None = None,
) -> tuple[str, str]:
    """Return (name, reason) of the implementation that `choose` would take."""
    fits = [
        row for row in table if device not in row.on_request and _misfit(row, device, dtype) is None
    ]
    if impl is None or impl == "auto":
        if not fits:
            reasons = "; ".join(f"{row.name}: {_misfit(row, device, dtype)}" for row in table)
            raise ValueError(f"ops.{op}: nothing runs {dtype} on {device} ({reasons})")
        return fits[0].name, f"first of {', '.join(r.name for r in fits)} for {dtype} on {device}"
    pinned = [row for row in table if row.name == impl]
    if not pinned:
        names = ", ".join(row.name for row in table)
        raise ValueError(f"ops.{op}={impl}: no such implementation; there are {names}")
    reason = _misfit(pinned[0], device, dtype)
    if reason:
        names = ", ".join(row.name for row in fits) or "none"
        raise ValueError(f"ops.{op}={impl}: {reason}; what runs here: {names}")
    return impl, "pinned"


def _misfit(row: Implementation, device: str, dtype: torch.dtype) -> str | None:
    if row.devices is not None and device not in (*row.devices, *row.on_request):
        return f"needs a device of {', '.join(row.devices)}, not {device}"
    if dtype not in row.dtypes:
        return f"does not take {dtype}"
    if row.requires is not None:
        reason: str | None = _load(*row.requires.split(":"))(device)
        return reason
    return None


@functools.cache
def _announce(op: str, name: str, why: str) -> None:
    logger.info("ops.%s: %s (%s)", op, name, why)


@functools.cache
def _load(module: str, name: str) -> Callable[..., Any]:
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return loaded
