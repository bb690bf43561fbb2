"""SequenceLayout: every token on one rank, back in order, with its place in its document."""

from typing import Literal

import pytest
import torch

from parallel.layout import Segment, SequenceLayout, build_layout

Kind = Literal["contiguous", "zigzag"]
KINDS: tuple[Kind, ...] = ("contiguous", "zigzag")
LENGTHS = ((1,), (64,), (1, 1, 1), (63, 1, 37), (8, 120), (101,), (17, 0, 5))
SIZES = ((1, 1), (1, 2), (1, 3), (1, 4), (1, 8), (2, 1), (2, 2), (3, 2), (2, 4))
"""Of Ulysses and of the ring."""


def layouts(
    lengths: tuple[int, ...], kind: Kind, ring: int, ulysses: int = 1
) -> list[SequenceLayout]:
    """Return the layout that each rank builds."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    size = ring * ulysses
    return [
        build_layout(cu_seqlens, kind=kind, sp_rank=rank, sp_size=size, ulysses=ulysses)
        for rank in range(size)
    ]


every_layout = pytest.mark.parametrize(
    ("lengths", "kind", "ulysses", "ring"),
    [
        pytest.param(
            lengths, kind, *size, id=f"T{'+'.join(map(str, lengths))}-{kind}-u{size[0]}-r{size[1]}"
        )
        for lengths in LENGTHS
        for kind in KINDS
        for size in SIZES
        if size == (1, 1) or sum(lengths) >= 2 * size[0] * size[1]
    ],
)


@every_layout
def test_shards_come_back_in_order(
    lengths: tuple[int, ...], kind: Kind, ulysses: int, ring: int
) -> None:
    T = sum(lengths)
    x = torch.randn(1, T, 3)
    ranks = layouts(lengths, kind, ring, ulysses)
    shards = [layout.shard(x) for layout in ranks]
    assert [shard.shape[1] for shard in shards] == [layout.num_tokens for layout in ranks]
    for rank, layout in enumerate(ranks):
        assert (layout.sp_rank, layout.sp_size) == (rank, ring * ulysses)
        assert layout.segments == ranks[0].segments
        assert [layout.count(other) for other in range(layout.sp_size)] == [
            shard.shape[1] for shard in shards
        ]
        for segment, rows in zip(layout.own, layout.rows(rank), strict=True):
            assert torch.equal(shards[rank][:, rows.rows], x[:, segment.rows])
        assert torch.equal(layout.restore(shards), x)


@every_layout
def test_position_ids_count_from_the_start_of_each_document(
    lengths: tuple[int, ...], kind: Kind, ulysses: int, ring: int
) -> None:
    expected = torch.cat([torch.arange(length) for length in lengths])
    for layout in layouts(lengths, kind, ring, ulysses):
        assert layout.position_ids().dtype == torch.int64
        assert layout.position_ids().device.type == "cpu"
        assert torch.equal(layout.position_ids(), layout.shard(expected[None])[0])


@every_layout
def test_pieces_are_the_documents_parts_on_this_rank(
    lengths: tuple[int, ...], kind: Kind, ulysses: int, ring: int
) -> None:
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    for layout in layouts(lengths, kind, ring, ulysses):
        pieces = [piece for pieces in layout.pieces for piece in pieces]
        assert all(len(piece) for piece in pieces), "an empty document has no piece"
        for piece in pieces:
            assert len(set(document[piece.rows].tolist())) == 1
            whole = layout.document(piece.start)
            assert (piece & whole) == piece
            assert (document == document[piece.start]).sum() == len(whole)
        # One after another they are the rows; where two meet, a document or a segment begins.
        assert [t for piece in pieces for t in range(piece.start, piece.stop)] == [
            t for segment in layout.own for t in range(segment.start, segment.stop)
        ]
        starts = {segment.start for segment in layout.own} | set(layout.documents)
        assert {piece.start for piece in pieces} <= starts
        bounds = [0, *torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()]
        assert list(layout.local_documents) == bounds
        assert layout.cu_seqlens.tolist() == bounds
        assert (layout.cu_seqlens.dtype, layout.cu_seqlens.device.type) == (torch.int32, "cpu")


@every_layout
def test_load_is_even(lengths: tuple[int, ...], kind: Kind, ulysses: int, ring: int) -> None:
    layout = layouts(lengths, kind, ring, ulysses)[0]
    sizes = [len(segment) for place in layout.ring.segments for segment in place]
    if kind == "contiguous" or ring == 1:
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == ring
    counts = [layout.count(rank) for rank in range(layout.sp_size)]
    assert max(counts) - min(counts) <= (1 if kind == "contiguous" else 2)


@every_layout
def test_neighbours_of_ulysses_hold_one_place_of_the_ring(
    lengths: tuple[int, ...], kind: Kind, ulysses: int, ring: int
) -> None:
    alone = layouts(lengths, kind, ring)
    for rank, layout in enumerate(layouts(lengths, kind, ring, ulysses)):
        place = layout.ring
        assert (place.sp_size, place.sp_rank) == (ring, rank // ulysses)
        assert place.documents == layout.documents
        tokens = [
            [t for s in segments for t in range(s.start, s.stop)] for segments in place.segments
        ]
        assert tokens == [
            [t for s in segments for t in range(s.start, s.stop)] for segments in alone[0].segments
        ]
        neighbours = range(place.sp_rank * ulysses, (place.sp_rank + 1) * ulysses)
        parts = [t for r in neighbours for s in layout.segments[r] for t in range(s.start, s.stop)]
        assert parts == tokens[place.sp_rank], "in the order that an exchange of heads brings"


def test_zigzag_pairs_early_with_late_chunks() -> None:
    ranks = layouts((16,), "zigzag", 2)
    assert ranks[0].shard(torch.arange(16)[None]).tolist() == [[0, 1, 2, 3, 12, 13, 14, 15]]
    assert ranks[1].shard(torch.arange(16)[None]).tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]


def test_ulysses_splits_the_pair_of_a_zigzag_place() -> None:
    shards = [
        layout.shard(torch.arange(16)[None]).tolist()[0]
        for layout in layouts((16,), "zigzag", 2, ulysses=2)
    ]
    assert shards == [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]
    place = layouts((16,), "zigzag", 2, ulysses=2)[3].ring
    assert place.segments == ((Segment(0, 4), Segment(12, 16)), (Segment(4, 12),))


def test_contiguous_is_in_order_of_the_ranks() -> None:
    shards = [layout.shard(torch.arange(7)[None]) for layout in layouts((7,), "contiguous", 3)]
    assert [shard.tolist()[0] for shard in shards] == [[0, 1], [2, 3], [4, 5, 6]]


def test_causal_pairs_are_even_in_zigzag() -> None:
    work = [int((layout.position_ids() + 1).sum()) for layout in layouts((256,), "zigzag", 4)]
    assert len(set(work)) == 1


def test_one_rank_keeps_the_tensor_itself() -> None:
    x = torch.randn(1, 9, 2)
    (layout,) = layouts((4, 5), "zigzag", 1)
    assert layout.shard(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize(("tokens", "ring", "ulysses"), [(3, 4, 1), (5, 2, 3), (1, 1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_rank_without_tokens_is_refused(tokens: int, ring: int, ulysses: int, kind: Kind) -> None:
    with pytest.raises(ValueError, match=f"a sequence of {tokens} tokens") as caught:
        layouts((tokens,), kind, ring, ulysses)
    remedy = int(str(caught.value).split("give ")[1].split(" tokens")[0])
    layouts((remedy,), kind, ring, ulysses)


def test_segments_meet_in_what_both_hold() -> None:
    assert Segment(2, 7) & Segment(5, 9) == Segment(5, 7)
    assert len(Segment(2, 4) & Segment(6, 9)) == 0
    assert Segment(2, 4).shift(3) == Segment(5, 7)
