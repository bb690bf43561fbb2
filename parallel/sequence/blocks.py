"""Which rows of queries see which rows of keys, as rectangles and triangles.

A document is contiguous and so is a segment, so that at most one document reaches from one segment
into a later one: what the later one sees of the earlier one is a rectangle, or within a window a
rectangle with a corner cut off along its diagonal.
"""

from dataclasses import dataclass
from typing import Literal

from parallel.layout import Segment, SequenceLayout


@dataclass(frozen=True)
class Block:
    """Rows of queries and the rows of keys they see.

    Pattern: own (the rank's own rows, causal within its pieces of documents); full (every query
    sees every key); late (query i sees the keys from i on: causal in reversed time).
    """

    queries: Segment
    keys: Segment
    pattern: Literal["own", "full", "late"]


def own_block(layout: SequenceLayout) -> Block:
    """Return the block of all rows of this rank."""
    rows = Segment(0, layout.num_tokens)
    return Block(rows, rows, "own")


def blocks_between(layout: SequenceLayout, rank: int) -> tuple[Block, ...]:
    """Return what this rank's queries see of the keys of `rank`, without the own block.

    `rank` may be this one, whose later segments see the earlier ones.
    """
    blocks: list[Block] = []
    for queries, query_rows in zip(layout.own, layout.rows(layout.sp_rank), strict=True):
        for keys, key_rows in zip(layout.segments[rank], layout.rows(rank), strict=True):
            if keys.stop > queries.start or not len(keys) or not len(queries):
                continue
            document = layout.document(queries.start)
            seen = (keys & document).shift(key_rows.start - keys.start)
            seeing = (queries & document).shift(query_rows.start - queries.start)
            if len(seen):
                blocks.append(Block(seeing, seen, "full"))
    return tuple(_join(blocks))


def window_spans(layout: SequenceLayout, rank: int, window_size: int) -> tuple[Segment, ...]:
    """Return, for each segment of `rank`, the tokens before it that its queries see.

    A query sees `window_size` tokens, its own included, of its own document.
    """
    spans = []
    for segment in layout.segments[rank]:
        first = segment.start
        if len(segment):
            first = max(layout.document(segment.start).start, segment.start - (window_size - 1))
        spans.append(Segment(first, segment.start))
    return tuple(spans)


def window_blocks(layout: SequenceLayout, window_size: int) -> tuple[Block, ...]:
    """Return what this rank's queries see of its `window_spans`, laid one after another."""
    blocks: list[Block] = []
    offset = 0
    spans = window_spans(layout, layout.sp_rank, window_size)
    for segment, rows, span in zip(layout.own, layout.rows(layout.sp_rank), spans, strict=True):
        if not len(span):
            continue
        # The last query that sees the last key is window_size - 1 behind it.
        seeing = layout.document(segment.start) & segment
        seeing = seeing & Segment(seeing.start, segment.start + window_size - 1)
        queries = seeing.shift(rows.start - segment.start)
        keys = span.shift(offset - span.start)
        offset += len(span)
        # Query i sees the keys from i - free on: all of them up to `free`, which is not 0 where
        # the document begins inside the window.
        free = min(window_size - 1 - len(span), len(queries))
        tail = len(queries) - free
        head, cut = Segment(keys.start, keys.start + tail), Segment(keys.start + tail, keys.stop)
        first = Segment(queries.start, queries.start + free)
        rest = Segment(first.stop, queries.stop)
        blocks += [
            Block(queries, cut, "full"), Block(first, head, "full"), Block(rest, head, "late")
        ]  # fmt: skip
    return tuple(block for block in blocks if len(block.queries) and len(block.keys))


def _join(blocks: list[Block]) -> list[Block]:
    """Join rectangles that lie side by side."""
    joined: list[Block] = []
    for block in blocks:
        if joined:
            last = joined[-1]
            if last.keys == block.keys and last.queries.stop == block.queries.start:
                queries = Segment(last.queries.start, block.queries.stop)
                joined[-1] = Block(queries, block.keys, "full")
                continue
            if last.queries == block.queries and last.keys.stop == block.keys.start:
                keys = Segment(last.keys.start, block.keys.stop)
                joined[-1] = Block(block.queries, keys, "full")
                continue
        joined.append(block)
    return joined
