"""The segments of all ranks in the order of the sequence, along which states are handed on."""

from dataclasses import dataclass
from functools import cached_property

import torch

from parallel.layout import Segment, SequenceLayout


@dataclass(frozen=True)
class Chain:
    """A place in the chain is a segment; backwards, the last segment stands first."""

    layout: SequenceLayout
    is_reverse: bool = False

    @cached_property
    def order(self) -> list[tuple[int, int]]:
        """Rank of each place, and which of the rank's segments it is."""
        places = [
            (segment.start, rank, index)
            for rank, segments in enumerate(self.layout.segments)
            for index, segment in enumerate(segments)
        ]
        return [(rank, index) for _, rank, index in sorted(places, reverse=self.is_reverse)]

    @cached_property
    def own(self) -> list[int]:
        """Places of this rank, in the order of the chain."""
        return [i for i, (rank, _) in enumerate(self.order) if rank == self.layout.sp_rank]

    def enter(self, place: int, before: torch.Tensor) -> torch.Tensor:
        """Return what enters at `place` of what left `before` it: all or nothing."""
        later = self._segment(place - 1 if self.is_reverse else place)
        joined = place > 0 and self.layout.document(later.start).start < later.start
        return before if joined else torch.zeros_like(before)

    def leave(
        self,
        place: int,
        transition: torch.Tensor | None,
        added: torch.Tensor,
        entered: torch.Tensor,
    ) -> torch.Tensor:
        """Return added + A entered, backwards with A transposed, as far as a document passes."""
        if not self.is_passed(place):
            return added
        if transition is not None and self.is_reverse and transition.shape[-1] > 1:
            transition = transition.mT
        return added + transform(transition, entered)

    def is_passed(self, place: int) -> bool:
        """Whether a document that began before fills all of the segment at `place`."""
        segment = self._segment(place)
        document = self.layout.document(segment.start)
        return document.start < segment.start and segment.stop <= document.stop

    def _segment(self, place: int) -> Segment:
        rank, index = self.order[place]
        return self.layout.segments[rank][index]


def transform(transition: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    """Return A S: A is 1 (None), has an element per head or channel, or is a matrix per head."""
    if transition is None:
        return state
    return transition @ state if transition.shape[-1] > 1 else transition * state
