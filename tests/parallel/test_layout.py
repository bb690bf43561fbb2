"""SequenceLayout: every token on one rank, back in order, with its place in its document."""

from typing import Literal

import pytest
import torch

from parallel.layout import SequenceLayout, build_layout

Kind = Literal["contiguous", "zigzag"]
KINDS: tuple[Kind, ...] = ("contiguous", "zigzag")
LENGTHS = ((1,), (64,), (1, 1, 1), (63, 1, 37), (8, 120), (101,))
SIZES = (1, 2, 3, 4, 8)


def layouts(lengths: tuple[int, ...], kind: Kind, sp_size: int) -> list[SequenceLayout]:
    """Return the layout that each rank builds."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return [
        build_layout(cu_seqlens, kind=kind, sp_rank=rank, sp_size=sp_size)
        for rank in range(sp_size)
    ]


every_layout = [
    pytest.param(lengths, kind, size, id=f"T{'+'.join(map(str, lengths))}-{kind}-P{size}")
    for lengths in LENGTHS
    for kind in KINDS
    for size in SIZES
]


@pytest.mark.parametrize(("lengths", "kind", "sp_size"), every_layout)
def test_shards_come_back_in_order(lengths: tuple[int, ...], kind: Kind, sp_size: int) -> None:
    T = sum(lengths)
    x = torch.randn(1, T, 3)
    ranks = layouts(lengths, kind, sp_size)
    shards = [layout.shard(x) for layout in ranks]
    assert [shard.shape[1] for shard in shards] == [layout.num_tokens for layout in ranks]
    assert sum(layout.num_tokens for layout in ranks) == T
    for layout in ranks:
        assert layout.sp_size == sp_size
        assert layout.segments == ranks[0].segments
        assert torch.equal(layout.restore(shards), x)


@pytest.mark.parametrize(("lengths", "kind", "sp_size"), every_layout)
def test_position_ids_count_from_the_start_of_each_document(
    lengths: tuple[int, ...], kind: Kind, sp_size: int
) -> None:
    ranks = layouts(lengths, kind, sp_size)
    expected = torch.cat([torch.arange(length) for length in lengths])
    for layout in ranks:
        assert layout.position_ids().dtype == torch.int64
        assert torch.equal(layout.position_ids(), layout.shard(expected[None])[0])


@pytest.mark.parametrize(("lengths", "kind", "sp_size"), every_layout)
def test_load_is_even(lengths: tuple[int, ...], kind: Kind, sp_size: int) -> None:
    ranks = layouts(lengths, kind, sp_size)
    segments = [segment for rank in ranks[0].segments for segment in rank]
    sizes = [len(segment) for segment in segments]
    assert max(sizes) - min(sizes) <= 1
    per_rank = 1 if kind == "contiguous" or sp_size == 1 else 2
    assert all(len(rank) == per_rank for rank in ranks[0].segments)


def test_zigzag_pairs_early_with_late_chunks() -> None:
    ranks = layouts((16,), "zigzag", 2)
    assert ranks[0].shard(torch.arange(16)[None]).tolist() == [[0, 1, 2, 3, 12, 13, 14, 15]]
    assert ranks[1].shard(torch.arange(16)[None]).tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]


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
