"""Length alignment: every expert gets equally many rows from every rank.

Missing rows are zero, surplus ones are dropped, first come first served. So the ranks send even
parts and need not tell each other how many rows come. What is dropped depends on how tokens are
spread over ranks and micro batches, and with it all numbers.
"""

import torch

from ops.moe import permute, unpermute
from parallel.comm import Comm
from parallel.expert import Dispatch, Journey, take_rows


class AlignedDispatch(Dispatch):
    """A dispatch with `capacity` rows of this rank for every expert; no expert is copied.

    Args:
        x: tokens [N, E].
        experts: int64 [N, k], the experts of each token.
        num_experts: of all ranks together; the size of the axis divides it.
        comm: collectives on behalf of the layer.
        capacity: the same on every rank of the axis.
        impl: pin of the operators of `ops.moe`.

    Attributes:
        sent: int64 [num_experts], rows that go to each expert, padding included.
        counts: int64 [num_experts / P], rows of each expert here, in what `wait` returns.
    """

    def __init__(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        num_experts: int,
        comm: Comm,
        *,
        capacity: int,
        impl: str | None = None,
    ) -> None:
        self._impl, axis = impl, comm.mesh.ep
        rows, self._order, chosen = permute(x, experts, num_experts, impl=impl)
        place = torch.arange(capacity, device=x.device)
        first = (chosen.cumsum(0) - chosen)[:, None]
        # Where each aligned row is among the sorted ones, and the other way round; -1: nowhere.
        self._source = torch.where(place < chosen[:, None], first + place, -1).flatten()
        sorted_experts = experts.flatten()[self._order]
        place = torch.arange(len(rows), device=x.device) - first[sorted_experts, 0]
        self._aligned = torch.where(place < capacity, sorted_experts * capacity + place, -1)
        self._width = experts.shape[1]
        self.sent = torch.full_like(chosen, capacity)
        local = num_experts // axis.size
        self.counts = self.sent[:local] * axis.size
        self._shape = axis.size, local, capacity, x.shape[1]
        self.kept, self.kept_counts = x[:0], chosen[:0]
        self._rows = take_rows(rows, self._source, self._aligned, has_gaps=True)
        self._journey: Journey | None = None
        if axis.size > 1:
            even = [local * capacity] * axis.size
            self._journey = Journey(comm, even, even)
            self._rows = self._journey.start(self._rows, "dispatch")

    def wait(self) -> torch.Tensor:
        """Return the rows that have arrived, [sum of counts, E], sorted by expert."""
        if self._journey is None:
            return self._rows
        rows = self._journey.finish(self._rows).view(self._shape)
        return rows.transpose(0, 1).flatten(0, 2)

    def combine(
        self, y: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Dispatch`; rows that were dropped are zero."""
        if self._journey is not None:
            size, local, capacity, width = self._shape
            y = y.view(local, size, capacity, width).transpose(0, 1).flatten(0, 2)
            back = self._journey.reverse()
            y = back.finish(back.start(y, "combine"))
        rows = take_rows(y, self._aligned, self._source, has_gaps=True)
        return unpermute(rows, self._order, weights, impl=self._impl)

    def count_dropped(self, num_sinks: int) -> torch.Tensor:
        is_dropped = (self._aligned < 0) & (self._order >= num_sinks * self._width)
        return is_dropped.sum()
