"""What the Triton implementations share: where they run, and the launch settings of a kernel.

Settings live in `conf/blocks/<operator>.yaml`: kernel -> architecture -> size -> constants,
`num_warps` and `num_stages`. An architecture is looked up by its name (sm_90, gfx942), then by its
vendor (nvidia, amd), then as `default`, the static choice; a size takes the first row that is as
large, else the last.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
import yaml

Blocks = dict[str, int]
"""Block sizes by constant, `num_warps` and `num_stages`; keyword arguments of a launch."""

_TRIED: ContextVar[dict[tuple[str, str, int], Blocks] | None] = ContextVar("tried", default=None)


def explain_absence(device: str) -> str | None:
    """Return why kernels cannot run on a device type, or None where they can."""
    if device != "cpu" or triton.knobs.runtime.interpret:
        return None
    return "runs on a CPU in Triton's interpreter alone, for tests: start with TRITON_INTERPRET=1"


def arch_of(device: torch.device) -> str:
    """Return the architecture that kernels run on: sm_90, gfx942, ... or interpreter."""
    if device.type == "cpu":
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def dot_dtype(x: torch.Tensor) -> tl.dtype:
    """Return the element type that operands of `tl.dot` have for inputs like x.

    That of x on a GPU; float32 in the interpreter, whose products of bfloat16 are wrong.
    """
    return tl.float32 if x.device.type == "cpu" else _TYPES[x.dtype]


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def find_blocks(op: str, kernel: str, size: int, arch: str | torch.device) -> Blocks:
    """Return the launch settings of a kernel.

    Args:
        op: the operator, whose file holds the settings.
        kernel: its name there.
        size: what the choice depends on (head dim, row width, ...).
        arch: architecture, or the device that has it.

    Raises:
        ValueError: the file has no row for the kernel.
    """
    arch = arch_of(arch) if isinstance(arch, torch.device) else arch
    rows = find_rows(op, kernel, arch)
    limit = min((limit for limit in rows if size <= limit), default=max(rows))
    return dict((_TRIED.get() or {}).get((op, kernel, limit), rows[limit]))


def find_rows(op: str, kernel: str, arch: str) -> dict[int, Blocks]:
    """Return the settings of a kernel on an architecture by size, see `find_blocks`."""
    vendor = {"s": "nvidia", "g": "amd"}.get(arch[0], "default")
    archs = _read_settings(op).get(kernel, {})
    for name in (arch, vendor, "default"):
        if name in archs:
            return archs[name]
    raise ValueError(f"conf/blocks/{op}.yaml has no row for {kernel} on {arch}; add a default")


def settings_file(op: str) -> Path:
    """Return the file of an operator's settings."""
    return Path(str(resources.files("conf").joinpath("blocks", f"{op}.yaml")))


@contextmanager
def trying(op: str, kernel: str, size: int, blocks: Blocks) -> Iterator[None]:
    """Let `find_blocks` return `blocks` instead of the row of `size` inside the context."""
    token = _TRIED.set((_TRIED.get() or {}) | {(op, kernel, size): blocks})
    try:
        yield
    finally:
        _TRIED.reset(token)


@functools.cache
def _read_settings(op: str) -> dict[str, dict[str, dict[int, Blocks]]]:
    settings: dict[str, Any] = yaml.safe_load(settings_file(op).read_text())
    return settings
