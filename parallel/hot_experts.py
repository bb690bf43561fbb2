"""Hot experts: where a rank has many rows for an expert of another, its weights come to the rows.

What the last steps asked of the experts decides which are copied in the next, by the rule of
FasterMoE (doi:10.1145/3503221.3508418) in bytes: a copy travels once per step and its gradient back
once, the rows of all micro batches stay. Which rank computes a row does not change what comes out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from parallel.comm import Comm, Exchange
from parallel.recompute import is_backward

ROW_JOURNEYS = 4
"""Dispatch, combine, and the gradients of both."""
MARGIN = 1.25
"""By so much rows must outweigh a copy, for the next step's load is not quite that of the last."""
GRADIENT_ITEMSIZE = 4


def plan_copies(
    rows: torch.Tensor, *, row_bytes: int, copy_bytes: int, max_copies: int
) -> torch.Tensor:
    """Return which experts each rank should have a copy of: those that save most bytes.

    Args:
        rows: int64 [P, G], rows that each rank has for each expert in a step; the P ranks hold
            equal parts of the G experts, in order.
        row_bytes: of one row on one way.
        copy_bytes: of an expert's weights on their way here and of their gradient on its way back.
        max_copies: most copies on a rank.

    Returns:
        bool [P, G], never of an expert that the rank holds.
    """
    num_ranks, num_experts = rows.shape
    owners = torch.arange(num_experts) // (num_experts // num_ranks)
    gains = ROW_JOURNEYS * row_bytes * rows.double() - MARGIN * copy_bytes
    gains.masked_fill_(owners == torch.arange(num_ranks)[:, None], 0)
    gains, experts = gains.sort(dim=1, descending=True, stable=True)
    chosen = gains[:, :max_copies] > 0
    return torch.zeros_like(rows, dtype=torch.bool).scatter(1, experts[:, :max_copies], chosen)


class HotExperts:
    """What each step asks of the experts of this stage, and the copies of them that it has.

    By default there are no experts here.

    Args:
        layers: weights of the experts on this rank by name of their layer, [G / P, ...] each.
        hidden_size: of a row.
        dtype: of a row.
        max_copies: most copies on a rank in each layer.
        micro_batches: of each rank in a step.
        comm: collectives; the ranks of axis `ep` share out the experts.

    Attributes:
        rows: int64 [P, layers, G], rows that each rank had for each expert in the last step, on a
            CPU; where layers differ in G, the rest is 0.
        copied: bool [P, layers, G], the copies that each rank had in the last step.
    """

    def __init__(
        self,
        layers: Mapping[str, Sequence[torch.Tensor]] | None = None,
        *,
        hidden_size: int = 1,
        dtype: torch.dtype = torch.float32,
        max_copies: int = 0,
        micro_batches: int = 1,
        comm: Comm | None = None,
    ) -> None:
        self._layers, self._comm = layers or {}, comm or Comm()
        self._row_bytes, self._dtype = hidden_size * dtype.itemsize, dtype
        self._max_copies, self._micro_batches = max_copies, micro_batches
        mesh = self._comm.mesh
        self._sizes = [mesh.ep.size * len(weights[0]) for weights in self._layers.values()]
        shape = (len(self._sizes), max(self._sizes, default=0))
        self._here = torch.zeros(shape, dtype=torch.int64, device=mesh.device)
        self._loans: dict[str, _Loan] = {}
        self.rows = torch.zeros(mesh.ep.size, *shape, dtype=torch.int64)
        self.copied = torch.zeros_like(self.rows, dtype=torch.bool)
        self._planned = self.copied

    def lend(self, layer: str) -> "Lent":
        """Return the weights to compute a micro batch with; in the first one copies set out."""
        return Lent(self._loans.get(layer))

    def count(self, layer: str, rows: torch.Tensor) -> None:
        """Note the rows that this rank has for each expert, int64 [G], in a micro batch."""
        if layer in self._layers and not is_backward():
            self._here[list(self._layers).index(layer), : len(rows)] += rows

    def end_step(self) -> None:
        """Gather what was counted and choose the copies of the next step.

        Every rank of the axis `ep` must call, and chooses the same.
        """
        if not self._layers:
            return
        before = self.rows
        self.rows = self._comm.at(kind="metrics").all_gather(self._here, self._comm.mesh.ep).cpu()
        # A load that jumps from expert to expert would pay for copies and use none.
        steady = torch.minimum(before, self.rows)
        self._here = torch.zeros_like(self._here)
        self.copied, self._planned = self._planned, torch.zeros_like(self.copied)
        self._loans = {}
        for i, (layer, weights) in enumerate(self._layers.items()):
            size = sum(weight[0].numel() for weight in weights)
            copied = plan_copies(
                steady[:, i, : self._sizes[i]],
                row_bytes=self._row_bytes,
                copy_bytes=size * (self._dtype.itemsize + GRADIENT_ITEMSIZE),
                max_copies=self._max_copies,
            )
            self._planned[:, i, : self._sizes[i]] = copied
            comm = self._comm.at(layer=layer, kind="moe")
            loan = _Loan(weights, copied, self._dtype, self._micro_batches, comm)
            if loan.takers:
                self._loans[layer] = loan


class Lent:
    """The weights of a layer's experts for one micro batch, such that gradients reach their owners.

    Attributes:
        own: those of the experts that this rank holds; None where it has nothing to do with a copy.
        copied: the experts that are copied here, in order.
    """

    def __init__(self, loan: "_Loan | None") -> None:
        self._loan = loan
        self.own: tuple[torch.Tensor, ...] | None = None
        self.copied: list[int] = []
        if loan is not None:
            *own, self._link = _Lend.apply(loan, *loan.weights)
            self.own, self.copied = tuple(own), loan.copied

    def copies(self) -> tuple[torch.Tensor, ...]:
        """Return the weights of the copied experts, once they are here."""
        copies: tuple[torch.Tensor, ...] = _Borrow.apply(self._link, self._loan)
        return copies


class _Loan:
    """Copies from and to this rank, of one layer and for one step.

    Attributes:
        weights: of the experts that this rank holds.
        copied: the experts that are copied here.
        takers: the ranks that each expert is copied to, where this rank sends or receives it.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        copied: torch.Tensor,
        dtype: torch.dtype,
        micro_batches: int,
        comm: Comm,
    ) -> None:
        self.weights, self._dtype, self._comm = weights, dtype, comm
        self._local, self._rank = len(weights[0]), comm.mesh.ep.index
        self.copied: list[int] = copied[self._rank].nonzero().flatten().tolist()
        takers = {e: copied[:, e].nonzero().flatten().tolist() for e in range(copied.shape[1])}
        self.takers = {
            e: ranks
            for e, ranks in takers.items()
            if ranks and self._rank in (self._owner(e), *ranks)
        }
        self._micro_batches, self._done = micro_batches, 0
        self._copies: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []
        self._returned: list[tuple[int, int, torch.Tensor]] = []
        self._under_way: list[Exchange] = []

    def start(self) -> None:
        """Send the copies on their way, unless that was done."""
        if self._copies:
            return
        self._copies = [
            torch.empty(len(self.copied), *w.shape[1:], dtype=self._dtype, device=w.device)
            for w in self.weights
        ]
        for expert, ranks in self.takers.items():
            owner = self._owner(expert)
            for weight, copies in zip(self.weights, self._copies, strict=True):
                sends, receives = {}, {}
                if owner == self._rank:
                    one = weight.detach()[expert % self._local].to(self._dtype)
                    sends = dict.fromkeys(ranks, one)
                else:
                    receives = {owner: copies[self.copied.index(expert)]}
                self._exchange(sends, receives)

    def arrive(self) -> list[torch.Tensor]:
        """Return the weights of the copied experts once they are here."""
        self._wait()
        return self._copies

    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add the gradients of the copies; those of the last micro batch set out with the rest."""
        wide = [gradient.float() for gradient in gradients]
        if self._gradients:
            wide = [a + b for a, b in zip(self._gradients, wide, strict=True)]
        self._gradients = wide
        if self._done == self._micro_batches - 1:
            self._return()

    def finish(self, gradients: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the gradients of the own weights, in the last micro batch with those of copies."""
        self._done += 1
        if self._done < self._micro_batches:
            return gradients
        if not self.copied:
            self._return()
        self._wait()
        sums = [gradient.clone() for gradient in gradients] if self._returned else gradients
        for i, expert, gradient in self._returned:
            sums[i][expert] += gradient
        self._copies, self._gradients, self._returned, self._done = [], [], [], 0
        return sums

    def _return(self) -> None:
        """Send the gradients of the copies to their owners."""
        self._wait()  # a rank that lends and never borrows has not done so
        for expert, ranks in self.takers.items():
            owner = self._owner(expert)
            for i, weight in enumerate(self.weights):
                sends, receives = {}, {}
                if owner == self._rank:
                    shape = weight.shape[1:]
                    receives = {
                        rank: torch.empty(shape, dtype=torch.float32, device=weight.device)
                        for rank in ranks
                    }
                    local = expert % self._local
                    self._returned += [(i, local, gradient) for gradient in receives.values()]
                else:
                    sends = {owner: self._gradients[i][self.copied.index(expert)]}
                self._exchange(sends, receives)

    def _exchange(
        self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]
    ) -> None:
        axis = self._comm.mesh.ep
        self._under_way.append(self._comm.exchange("expert_copy", sends, receives, axis))

    def _wait(self) -> None:
        for exchange in self._under_way:
            exchange.wait()
        self._under_way = []

    def _owner(self, expert: int) -> int:
        return expert // self._local


class _Lend(torch.autograd.Function):
    """Forward copies set out; backward the gradients of copies elsewhere have arrived."""

    @staticmethod
    def forward(ctx: Any, loan: _Loan, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.loan = loan
        loan.start()
        # The last one ties the copies to this place in the graph.
        return *(weight.view_as(weight) for weight in weights), weights[0].new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.loan.finish(gradients[:-1])


class _Borrow(torch.autograd.Function):
    """Forward copies have arrived; backward their gradients set out."""

    @staticmethod
    def forward(ctx: Any, link: torch.Tensor, loan: _Loan) -> tuple[torch.Tensor, ...]:
        ctx.loan = loan
        return tuple(copies.view_as(copies) for copies in loan.arrive())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None]:
        ctx.loan.add(gradients)
        return None, None
