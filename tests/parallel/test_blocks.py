"""Blocks of queries and keys, and the halos they read: every visible pair once, nothing else."""

from typing import Literal

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.layout import SequenceLayout, build_layout
from parallel.sequence.blocks import (
    Block,
    blocks_between,
    own_block,
    window_blocks,
    window_spans,
)
from parallel.sequence.halo import list_transfers


@st.composite
def layouts(draw: st.DrawFn) -> list[SequenceLayout]:
    """Draw a layout as each of its ranks sees it."""
    kind: Literal["contiguous", "zigzag"] = draw(st.sampled_from(["contiguous", "zigzag"]))
    ulysses, ring = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    # A segment holds one token at least.
    lengths[0] += max(0, 2 * ulysses * ring - sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    size = ulysses * ring
    return [
        build_layout(cu_seqlens, kind=kind, sp_rank=rank, sp_size=size, ulysses=ulysses)
        for rank in range(size)
    ]


def visible_pairs(layout: SequenceLayout, window_size: int | None = None) -> torch.Tensor:
    """Return [T, T] by definition: 1 where the query of the row sees the key of the column."""
    T = layout.documents[-1]
    t, s = torch.arange(T)[:, None], torch.arange(T)
    document = torch.bucketize(s, torch.tensor(layout.documents[1:-1]), right=True)
    visible = (s <= t) & (document[:, None] == document)
    if window_size is not None:
        visible &= s > t - window_size
    return visible.int()


def tokens_of(layout: SequenceLayout, rank: int) -> torch.Tensor:
    """Return the global token of each row of `rank`."""
    return torch.cat([torch.arange(s.start, s.stop) for s in layout.segments[rank]])


def cover(
    block: Block,
    layout: SequenceLayout,
    keys: torch.Tensor,
    counts: torch.Tensor,
    window_size: int | None = None,
) -> None:
    """Count the pairs of a block whose keys' rows are the global tokens `keys`."""
    queries = tokens_of(layout, layout.sp_rank)[block.queries.rows]
    keys = keys[block.keys.rows]
    assert len(queries) == len(block.queries), "the rows exist"
    assert len(keys) == len(block.keys), "the rows exist"
    i, j = torch.arange(len(queries))[:, None], torch.arange(len(keys))
    if block.pattern == "full":
        seen = torch.ones(len(queries), len(keys), dtype=torch.bool)
    elif block.pattern == "late":
        assert len(queries) == len(keys), "a triangle"
        seen = j >= i
    else:
        piece = torch.bucketize(j, torch.tensor(layout.local_documents[1:-1]), right=True)
        seen = (j <= i) & (piece[:, None] == piece)
        if window_size is not None:
            seen = seen & (j > i - window_size)
    counts[queries[:, None], keys] += seen.int()


@given(layouts())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_blocks_of_all_ranks_cover_what_is_visible_once(ranks: list[SequenceLayout]) -> None:
    counts = torch.zeros_like(visible_pairs(ranks[0]))
    for layout in ranks:
        cover(own_block(layout), layout, tokens_of(layout, layout.sp_rank), counts)
        for rank in range(layout.sp_size):
            for block in blocks_between(layout, rank):
                assert block.pattern == "full"
                cover(block, layout, tokens_of(layout, rank), counts)
    assert torch.equal(counts, visible_pairs(ranks[0]))


@given(layouts())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_blocks_between_places_of_the_ring_cover_what_is_visible_once(
    ranks: list[SequenceLayout],
) -> None:
    counts = torch.zeros_like(visible_pairs(ranks[0]))
    for layout in ranks[:: ranks[0].ulysses]:
        ring = layout.ring
        cover(own_block(ring), ring, tokens_of(ring, ring.sp_rank), counts)
        for place in range(ring.sp_size):
            for block in blocks_between(ring, place):
                cover(block, ring, tokens_of(ring, place), counts)
    assert torch.equal(counts, visible_pairs(ranks[0]))


@given(layouts(), st.integers(1, 70))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_window_blocks_cover_what_is_visible_once(
    ranks: list[SequenceLayout], window_size: int
) -> None:
    counts = torch.zeros_like(visible_pairs(ranks[0]))
    for layout in ranks:
        own = tokens_of(layout, layout.sp_rank)
        cover(own_block(layout), layout, own, counts, window_size)
        spans = window_spans(layout, layout.sp_rank, window_size)
        halo = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        for block in window_blocks(layout, window_size):
            cover(block, layout, halo, counts)
    assert torch.equal(counts, visible_pairs(ranks[0], window_size))


@given(layouts(), st.integers(1, 70))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_spans_hold_the_keys_that_are_seen_and_no_more(
    ranks: list[SequenceLayout], window_size: int
) -> None:
    visible = visible_pairs(ranks[0], window_size)
    for layout in ranks:
        for rank in range(layout.sp_size):
            spans = window_spans(layout, rank, window_size)
            for segment, span in zip(layout.segments[rank], spans, strict=True):
                keys = visible[segment.start : segment.stop].sum(0).nonzero().flatten()
                before = keys[keys < segment.start]
                assert before.tolist() == list(range(span.start, span.stop))


@given(layouts(), st.integers(1, 70))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_transfers_fill_every_halo_once(ranks: list[SequenceLayout], window_size: int) -> None:
    for layout in ranks:
        assert list_transfers(layout, window_size) == list_transfers(ranks[0], window_size)
    layout = ranks[0]
    for target in range(layout.sp_size):
        spans = window_spans(layout, target, window_size)
        expected = [token for span in spans for token in range(span.start, span.stop)]
        halo: list[int | None] = [None] * len(expected)
        for transfer in list_transfers(layout, window_size):
            if transfer.target == target:
                assert halo[transfer.halo.rows] == [None] * len(transfer.rows)
                tokens = tokens_of(layout, transfer.source)[transfer.rows.rows].tolist()
                assert len(tokens) == len(transfer.rows) > 0
                halo[transfer.halo.rows] = tokens
        assert halo == expected


def test_segments_that_lie_side_by_side_are_one_block() -> None:
    """In zigzag the last rank holds the middle: it sees all of the first rank's first segment."""
    layout = build_layout(
        torch.tensor([0, 16], dtype=torch.int32), kind="zigzag", sp_rank=1, sp_size=2
    )
    (block,) = blocks_between(layout, 0)
    assert (len(block.queries), len(block.keys)) == (8, 4)
