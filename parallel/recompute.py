"""Activation recomputation: run a part again in the backward pass instead of keeping its inside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


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
    """Return whether this runs inside a backward pass, as a forward pass that is recomputed does."""
    return torch._C._current_graph_task_id() != -1


def run_recomputed(
    function: Callable[..., torch.Tensor], x: torch.Tensor, *rest: Any, memory: Memory | None = None
) -> torch.Tensor:
    """Return function(x, *rest), keeping only `x` for the backward pass (arXiv:1604.06174).

    Args:
        memory: what the function remembers in; it is kept as well.
    """
    out = checkpoint(
        function,
        x,
        *rest,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), nullcontext() if memory is None else memory.replay()),
    )
    assert isinstance(out, torch.Tensor)
    return out
