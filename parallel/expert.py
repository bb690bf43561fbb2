"""Expert parallelism: tokens go to the ranks that hold their experts, and come back.

Every rank of the axis `ep` holds an equal part of the experts, in order. Rows travel sorted by
expert (dispatch), are computed where they arrive, and return the same way (combine); backward each
is the other's reverse.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ops.moe import permute, unpermute
from parallel.comm import Arrival, Comm


def mark_expert(parameter: nn.Parameter) -> None:
    """Say that the parameter holds experts in its first dimension, which ranks share out."""
    parameter.is_expert = True  # type: ignore[attr-defined]


def is_expert(parameter: torch.Tensor) -> bool:
    """Return whether the parameter holds experts in its first dimension."""
    return getattr(parameter, "is_expert", False)


class Dispatch:
    """Tokens on their way to the ranks of their experts, and back.

    Every rank of the axis makes one, then calls `wait` and `combine`. What is computed between the
    first two overlaps with the journey, and so do the gradients of it.

    Args:
        x: tokens [N, E].
        experts: int64 [N, k], the experts of each token.
        num_experts: of all ranks together; the size of the axis divides it.
        comm: collectives on behalf of the layer.
        copied: experts that are computed here on a copy of their weights; their rows stay.
        impl: pin of the operators of `ops.moe`.

    Attributes:
        sent: int64 [num_experts], rows that this rank has for each expert, those that stay too.
        counts: int64 [num_experts / P], rows of each expert here, in what `wait` returns.
        kept: rows for the copied experts [sum of kept_counts, E], sorted in the order of `copied`.
        kept_counts: int64 [copied], how many each of them has.
    """

    def __init__(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        num_experts: int,
        comm: Comm,
        *,
        copied: Sequence[int] = (),
        impl: str | None = None,
    ) -> None:
        self._comm, self._impl = comm, impl
        axis = comm.mesh.ep
        slots = torch.arange(num_experts, device=x.device)
        here = slots[list(copied)]
        # Behind all experts, so that what stays is sorted behind what travels.
        slots[here] = num_experts + torch.arange(len(copied), device=x.device)
        rows, self._order, counts = permute(
            x, slots[experts] if copied else experts, num_experts + len(copied), impl=impl
        )
        leaving, self.kept_counts = counts.split([num_experts, len(copied)])
        self.sent = leaving.index_copy(0, here, self.kept_counts)
        self._journey: Journey | None = None
        self._rows, self.kept = rows, rows[:0]
        self.counts = self.sent
        if axis.size > 1:
            table = leaving.view(axis.size, -1)
            ones = [1] * axis.size
            arrived = comm.start_all_to_all(table, ones, ones, axis, "counts").wait()
            self._sources = arrived.flatten()
            self.counts = arrived.sum(0)
            sends, receives = table.sum(1).tolist(), arrived.sum(1).tolist()
            if copied:
                rows, self.kept = rows.split([sum(sends), len(rows) - sum(sends)])
            self._journey = Journey(comm, sends, receives)
            self._rows = self._journey.start(rows, "dispatch")

    def wait(self) -> torch.Tensor:
        """Return the rows that have arrived, [sum of counts, E], sorted by expert."""
        if self._journey is None:
            return self._rows
        rows = self._journey.finish(self._rows)
        local = len(self.counts)
        ids = torch.arange(len(self._sources), device=rows.device) % local
        ids = ids.repeat_interleave(self._sources, output_size=len(rows))
        self._arrival = ids.argsort(stable=True)
        self._departure = self._arrival.argsort()
        return take_rows(rows, self._arrival, self._departure)

    def combine(
        self, y: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return [N, E]: the rows y, computed from those of `wait`, summed with their weights.

        Args:
            weights: float32 [N, k], of each token's experts.
            kept: rows computed from those of `kept`, where experts are copied.
        """
        if self._journey is not None:
            y = take_rows(y, self._departure, self._arrival)
            back = self._journey.reverse()
            y = back.finish(back.start(y, "combine"))
        if kept is not None:
            y = torch.cat([y, kept])
        return unpermute(y, self._order, weights, impl=self._impl)

    def count_dropped(self, num_sinks: int) -> torch.Tensor | int:
        """Return the choices that found no place, those of the first `num_sinks` tokens aside."""
        return 0


def take_rows(
    x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, *, has_gaps: bool = False
) -> torch.Tensor:
    """Return the rows x[index], of which none is kept for the backward pass.

    Args:
        x: [rows, E].
        index: int64 [out rows]; where it is -1 the row is 0.
        inverse: int64 [rows], where each row of x went; -1 for nowhere.
        has_gaps: whether there is a -1.
    """
    out: torch.Tensor = _TakeRows.apply(x, index, inverse, has_gaps)
    return out


class Journey:
    """One way of rows between the ranks, as two steps of a graph whose gradients go back alike."""

    def __init__(self, comm: Comm, sends: list[int], receives: list[int]) -> None:
        self.comm, self.sends, self.receives = comm, sends, receives
        self.under_way: Arrival | None = None
        self.name = ""

    def reverse(self) -> "Journey":
        return Journey(self.comm, self.receives, self.sends)

    def start(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Send rows; what is returned holds nothing before `finish`."""
        self.name = name
        out: torch.Tensor = _Start.apply(x, self)
        return out

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Finish.apply(x, self)
        return out

    def send(self, x: torch.Tensor) -> None:
        self.under_way = self.comm.start_all_to_all(
            x, self.sends, self.receives, self.comm.mesh.ep, self.name
        )

    def receive(self) -> torch.Tensor:
        assert self.under_way is not None, "sent before"
        rows, self.under_way = self.under_way.wait(), None
        return rows


class _Start(torch.autograd.Function):
    """Forward the rows set out; backward their gradients have arrived."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, journey: Journey) -> torch.Tensor:
        ctx.journey = journey
        journey.send(x)
        # Stands for what is under way: it has its place in the graph and no content.
        return x.new_zeros(1).expand(sum(journey.receives), *x.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.journey.home.receive(), None


class _Finish(torch.autograd.Function):
    """Forward the rows have arrived; backward their gradients set out."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, journey: Journey) -> torch.Tensor:
        ctx.journey = journey
        return journey.receive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        journey = ctx.journey
        journey.home = journey.reverse()
        journey.home.name = {"dispatch": "combine", "combine": "dispatch"}[journey.name]
        journey.home.send(dout)
        return dout.new_zeros(1).expand(dout.shape), None


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, has_gaps: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.has_gaps = has_gaps
        return _take(x, index, has_gaps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return _take(dout, inverse, ctx.has_gaps), None, None, None


def _take(x: torch.Tensor, index: torch.Tensor, has_gaps: bool) -> torch.Tensor:
    if not has_gaps:
        return x[index]
    return x[index.clamp_min(0)].masked_fill_((index < 0)[:, None], 0)
