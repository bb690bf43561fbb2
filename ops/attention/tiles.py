"""Which keys each block of queries meets: tiles that are all visible, or cut by a causal band."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Visibility:
    """Which keys of a document its queries see."""

    num_open: int
    """First keys that all queries see; where there are others, there are as many queries."""
    window: int
    """Keys of the causal band over the others that a query sees, its own included."""


@dataclass(frozen=True)
class Tile:
    """Keys first to last, in the band or open to all queries."""

    first: int
    last: int
    in_band: bool


@dataclass(frozen=True)
class Block:
    """Queries start to stop and the tiles they see."""

    start: int
    stop: int
    tiles: tuple[Tile, ...]


def cut_into_blocks(
    num_queries: int, num_keys: int, visibility: Visibility, block_size: int, max_keys: int
) -> list[Block]:
    """Cut the queries into blocks, none of them with open and band keys of its own."""
    num_open = visibility.num_open
    has_band = num_open < num_keys
    split = num_open if has_band else 0
    starts = [*range(0, split, block_size), *range(split, num_queries, block_size)]
    blocks = []
    for start, stop in itertools.pairwise([*starts, num_queries]):
        tiles = [Tile(*keys, in_band=False) for keys in _cut_evenly(0, num_open, max_keys)]
        if has_band and start >= num_open:
            first = max(num_open, start - visibility.window + 1)
            tiles += [Tile(*keys, in_band=True) for keys in _cut_evenly(first, stop, max_keys)]
        blocks.append(Block(start, stop, tuple(tiles)))
    return blocks


class BandBias:
    """Hides from the columns of a tile the keys later than they or before their window."""

    def __init__(self, block_size: int, window: int, group: int, like: torch.Tensor) -> None:
        self.window = window
        r = torch.arange(block_size, device=like.device)
        column = r.repeat_interleave(group)
        minus_inf = torch.full((), float("-inf"), dtype=like.dtype, device=like.device)
        zero = torch.zeros_like(minus_inf)
        self.later = torch.where(r[:, None] > column, minus_inf, zero)
        self.earlier = torch.where(r[:, None] < column, minus_inf, zero)

    def add(self, x: torch.Tensor, block: Block, tile: Tile) -> None:
        """Add -inf to the hidden part of x [heads, keys, columns]; only where there is one."""
        columns = x.shape[2]
        # Row r of `later` is key start + r, row r of `earlier` key start + 1 - window + r.
        earlier_end = min(tile.last, block.stop - self.window)
        for bias, origin, end in (
            (self.later, block.start, tile.last),
            (self.earlier, block.start + 1 - self.window, earlier_end),
        ):
            begin = max(origin, tile.first)
            if begin < end:
                hidden = bias[begin - origin : end - origin, :columns]
                x[:, begin - tile.first : end - tile.first].add_(hidden)


def _cut_evenly(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    count = math.ceil((last - first) / size)
    bounds = [first + (last - first) * i // count for i in range(count + 1)] if count else []
    return itertools.pairwise(bounds)
