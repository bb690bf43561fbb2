"""Activation recomputation: run a part again in the backward pass instead of keeping its inside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from conf.schema import ParallelConfig

Result = TypeVar("Result")


@dataclass(frozen=True)
class Recompute:
    """What of a model runs again in the backward pass; see `ParallelConfig` for each value.

    Attributes:
        layers: parallel.recompute.
        moe: parallel.moe_recompute.
        above: parallel.recompute_above.
    """

    layers: Literal["none", "selective", "full"] = "none"
    moe: Literal["none", "activation", "experts", "layer"] = "none"
    above: int | None = None

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "Recompute":
        """Return what a config says."""
        return cls(parallel.recompute, parallel.moe_recompute, parallel.recompute_above)

    def has_ffn(self, *, is_moe: bool) -> bool:
        """Return whether a whole FFN runs again by itself."""
        return self.layers == "selective" or (
            self.layers == "none" and self.moe == "layer" and is_moe
        )

    @property
    def inside_moe(self) -> "Recompute":
        """What is left to an MoE layer: nothing runs a third time."""
        if self.layers != "none" or self.moe == "layer":
            return Recompute()
        return Recompute(moe="experts") if self.moe == "experts" else self


class Memory:
    """Keeps what communication brought in a forward pass, for when the pass runs again.

    Neither bytes nor an order of collectives that differs between ranks come with recomputation.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[torch.Tensor, ...]] = []
        self._next: int | None = None

    def remember(self, compute: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """Return compute(), or in a second pass what the same call returned in the first."""
        if self._next is None:
            results = compute()
            # Without their history, which would hold the graph and this memory in it.
            self._kept.append(tuple(x.detach() for x in results))
            return results
        self._next += 1
        return tuple(x.detach() for x in self._kept[self._next - 1])

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Inside, the pass runs again."""
        self._next = 0
        try:
            yield
        finally:
            self._next = None


def is_backward() -> bool:
    """Return whether this runs inside a backward pass, as a recomputed forward pass does."""
    return torch._C._current_graph_task_id() != -1


def run_recomputed(
    function: Callable[..., Result],
    x: torch.Tensor,
    *rest: Any,
    memory: Memory | None = None,
    when: bool = True,
) -> Result:
    """Return function(x, *rest), keeping only `x` for the backward pass (arXiv:1604.06174).

    Args:
        memory: what the function remembers in; it is kept as well.
        when: whether to do so; else the function just runs.
    """
    if not when:
        return function(x, *rest)
    out: Result = checkpoint(
        function,
        x,
        *rest,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), nullcontext() if memory is None else memory.replay()),
    )
    return out


@contextmanager
def rebuilt(x: torch.Tensor, build: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Inside, who would keep `x` for its backward pass keeps nothing, and has it built again.

    Where that is cheap, nothing behind it needs to run again, as `run_recomputed` has it.

    Args:
        build: returns what x is; what it needs is kept.
    """
    place = x.untyped_storage().data_ptr()

    def pack(kept: torch.Tensor) -> torch.Tensor | tuple[Any, ...]:
        if kept.untyped_storage().data_ptr() != place:
            return kept.detach()  # an output that kept its own history would never be released
        return kept.shape, kept.stride(), kept.storage_offset()

    def unpack(kept: torch.Tensor | tuple[Any, ...]) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        with torch.no_grad():
            return build().as_strided(*kept)

    with saved_tensors_hooks(pack, unpack):
        yield
