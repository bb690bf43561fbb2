"""SequenceLayout: which tokens of a packed sequence each sequence-parallel rank holds.

Every parallel algorithm is written once against this map (contiguous: one segment per rank;
zigzag: two, so that causal work is balanced). One rank is the ordinary case, not a special one.
"""

import itertools
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch


@dataclass(frozen=True)
class Segment:
    """Tokens, or rows of a tensor, [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __and__(self, other: "Segment") -> "Segment":
        """What both hold; of length 0 where that is nothing."""
        start = max(self.start, other.start)
        return Segment(start, max(start, min(self.stop, other.stop)))

    def shift(self, offset: int) -> "Segment":
        return Segment(self.start + offset, self.stop + offset)

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class SequenceLayout:
    """Tokens of one packed global sequence, spread over the ranks of the sequence axis.

    Attributes:
        segments: per rank, its ordered contiguous segments of the global sequence.
        sp_rank: the rank that this process is.
        documents: global bounds of the packed documents, from 0 to the number of tokens.
        ulysses: so many neighbouring ranks together hold one place of the ring.
    """

    segments: tuple[tuple[Segment, ...], ...]
    sp_rank: int
    documents: tuple[int, ...]
    ulysses: int = 1

    @property
    def sp_size(self) -> int:
        return len(self.segments)

    @property
    def own(self) -> tuple[Segment, ...]:
        """This rank's segments."""
        return self.segments[self.sp_rank]

    @property
    def num_tokens(self) -> int:
        """Tokens that this rank holds."""
        return self.count(self.sp_rank)

    def count(self, rank: int) -> int:
        """Return the tokens that `rank` holds."""
        return sum(len(segment) for segment in self.segments[rank])

    def rows(self, rank: int) -> tuple[Segment, ...]:
        """Return where each segment of `rank` stands among its rows."""
        stops = itertools.accumulate(len(segment) for segment in self.segments[rank])
        return tuple(
            Segment(stop - len(segment), stop)
            for stop, segment in zip(stops, self.segments[rank], strict=True)
        )

    def document(self, token: int) -> Segment:
        """Return the document that holds a token of the global sequence."""
        index = bisect_right(self.documents, token)
        return Segment(self.documents[index - 1], self.documents[index])

    @cached_property
    def _bounds(self) -> list[int]:
        return sorted(set(self.documents))  # an empty document bounds nothing

    @cached_property
    def pieces(self) -> tuple[tuple[Segment, ...], ...]:
        """This rank's segments, each cut where documents begin; global tokens."""
        return tuple(
            tuple(
                Segment(*bounds)
                for bounds in itertools.pairwise(
                    (
                        segment.start,
                        *(b for b in self._bounds if segment.start < b < segment.stop),
                        segment.stop,
                    )
                )
            )
            for segment in self.own
        )

    @cached_property
    def local_documents(self) -> tuple[int, ...]:
        """Bounds of the pieces among this rank's rows, from 0 to T."""
        lengths = [len(piece) for pieces in self.pieces for piece in pieces]
        return tuple(itertools.accumulate(lengths, initial=0))

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """`local_documents` as int32 [N + 1], on the host, where operators read it."""
        return torch.tensor(self.local_documents, dtype=torch.int32)

    @cached_property
    def ring(self) -> "SequenceLayout":
        """The layout over the places of the ring, each what `ulysses` neighbours hold together."""
        if self.ulysses == 1:
            return self
        places = []
        for first in range(0, self.sp_size, self.ulysses):
            joined: list[Segment] = []
            for segment in itertools.chain(*self.segments[first : first + self.ulysses]):
                if joined and joined[-1].stop == segment.start:
                    segment = Segment(joined.pop().start, segment.stop)
                joined.append(segment)
            places.append(tuple(joined))
        return SequenceLayout(tuple(places), self.sp_rank // self.ulysses, self.documents)

    def shard(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's tokens of a global `[1, T_global, ...]` tensor."""
        parts = [x[:, s.start : s.stop] for s in self.own]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def restore(self, shards: list[torch.Tensor]) -> torch.Tensor:
        """Put the shards of all ranks, `[1, T_rank, ...]` each, back into global order."""
        pieces = []
        for rank_segments, shard in zip(self.segments, shards, strict=True):
            sizes = [len(segment) for segment in rank_segments]
            starts = [segment.start for segment in rank_segments]
            pieces += list(zip(starts, shard.split(sizes, dim=1), strict=True))
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda item: item[0])], dim=1)

    def position_ids(self) -> torch.Tensor:
        """Return int64 [T]: the place of each of this rank's tokens within its document."""
        return torch.cat(
            [
                torch.arange(len(piece)) + piece.start - self.document(piece.start).start
                for pieces in self.pieces
                for piece in pieces
            ]
        )


def build_layout(
    cu_seqlens: torch.Tensor,
    *,
    kind: Literal["contiguous", "zigzag"] = "contiguous",
    sp_rank: int = 0,
    sp_size: int = 1,
    ulysses: int = 1,
) -> SequenceLayout:
    """Spread the sequence that `cu_seqlens` delimits over `sp_size` ranks.

    Args:
        cu_seqlens: int32 [N + 1] on the host, starts at 0.
        kind: contiguous, or zigzag (place r of the ring holds chunks r and 2 R - 1 - r of 2 R).
        ulysses: ranks that share one place of the ring, each a contiguous part of its tokens;
            divides sp_size.

    Sizes differ by one token at most where the length does not divide, so nothing is padded.

    Raises:
        ValueError: a rank would hold no token.
    """
    documents = tuple(cu_seqlens.tolist())
    num_places = sp_size // ulysses
    num_chunks = num_places if kind == "contiguous" or num_places == 1 else 2 * num_places
    chunks = _split((Segment(0, documents[-1]),), num_chunks)
    if num_chunks == num_places:
        places = chunks
    else:
        places = [chunks[r] + chunks[num_chunks - 1 - r] for r in range(num_places)]
    segments = tuple(part for place in places for part in _split(place, ulysses))
    if sp_size > 1 and not all(len(part[0]) for part in segments):
        raise ValueError(
            f"a sequence of {documents[-1]} tokens leaves some of sp_size={sp_size} ranks without "
            f"any; give {2 * sp_size} tokens at least, or use fewer ranks"
        )
    return SequenceLayout(segments, sp_rank, documents, ulysses)


def _split(segments: tuple[Segment, ...], count: int) -> list[tuple[Segment, ...]]:
    """Cut the tokens of `segments`, one after another, into `count` even parts."""
    total = sum(len(segment) for segment in segments)
    parts = []
    for index in range(count):
        wanted = Segment(total * index // count, total * (index + 1) // count)
        offset, part = 0, []
        for segment in segments:
            here = wanted & Segment(offset, offset + len(segment))
            if len(here):
                part.append(here.shift(segment.start - offset))
            offset += len(segment)
        parts.append(tuple(part) or (Segment(segments[0].start, segments[0].start),))
    return parts
