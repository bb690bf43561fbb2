"""SequenceLayout: which tokens of a packed sequence each sequence-parallel rank holds.

Every parallel algorithm is written once against this map (contiguous: one segment per rank;
zigzag: two, so that causal work is balanced). One rank is the ordinary case, not a special one.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of the global sequence."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class SequenceLayout:
    """Tokens of one packed global sequence, spread over the ranks of the sequence axis.

    Attributes:
        segments: per rank, its ordered contiguous segments of the global sequence.
        sp_rank: the rank that this process is.
        cu_seqlens: int32 [N+1] global starts of the packed documents and their end.
    """

    segments: tuple[tuple[Segment, ...], ...]
    sp_rank: int
    cu_seqlens: torch.Tensor

    @property
    def sp_size(self) -> int:
        return len(self.segments)

    @property
    def num_tokens(self) -> int:
        """Tokens that this rank holds."""
        return sum(len(segment) for segment in self.segments[self.sp_rank])

    def shard(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's tokens of a global `[1, T_global, ...]` tensor."""
        parts = [x[:, s.start : s.stop] for s in self.segments[self.sp_rank]]
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
        ids = torch.cat(
            [
                torch.arange(s.start, s.stop, device=self.cu_seqlens.device)
                for s in self.segments[self.sp_rank]
            ]
        )
        document = torch.searchsorted(self.cu_seqlens, ids, right=True) - 1
        return ids - self.cu_seqlens[document]


def build_layout(
    cu_seqlens: torch.Tensor,
    *,
    kind: Literal["contiguous", "zigzag"] = "contiguous",
    sp_rank: int = 0,
    sp_size: int = 1,
) -> SequenceLayout:
    """Spread the sequence that `cu_seqlens` delimits over `sp_size` ranks.

    Args:
        cu_seqlens: int32 [N+1], starts at 0.
        kind: contiguous, or zigzag (rank r holds chunks r and 2 sp_size - 1 - r of 2 sp_size).

    Chunk sizes differ by one token at most where the length does not divide.
    """
    num_tokens = int(cu_seqlens[-1])
    num_chunks = sp_size if kind == "contiguous" or sp_size == 1 else 2 * sp_size
    bounds = [num_tokens * i // num_chunks for i in range(num_chunks + 1)]
    chunks = [Segment(a, b) for a, b in itertools.pairwise(bounds)]
    if num_chunks == sp_size:
        segments: tuple[tuple[Segment, ...], ...] = tuple((chunk,) for chunk in chunks)
    else:
        segments = tuple((chunks[r], chunks[num_chunks - 1 - r]) for r in range(sp_size))
    return SequenceLayout(segments, sp_rank, cu_seqlens)
