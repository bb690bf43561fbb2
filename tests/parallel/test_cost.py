"""Bytes by formula: the published volumes at even shares, and a count by hand at uneven ones."""

import itertools

import pytest
import torch

from parallel.cost import SequenceCost, Traffic, expert_traffic, pad_heads, zero_traffic
from parallel.layout import build_layout

HALO, GATHER, SCAN = ("sp", "halo"), ("sp", "all_gather"), ("sp", "state_scan")
RING, ULYSSES = ("ring", "ring"), ("ulysses", "all_to_all")
COUNTS, DISPATCH, COMBINE = ("ep", "counts"), ("ep", "dispatch"), ("ep", "combine")
COPY = ("ep", "expert_copy")
SIZES = [2, 4, 8]


def costs(
    lengths: list[int],
    num_ranks: int,
    *,
    kind: str = "contiguous",
    linear: str = "gather",
    ulysses: int = 1,
    itemsize: int = 2,
    recompute: bool = False,
) -> list[SequenceCost]:
    """Return the cost model of every rank."""
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return [
        SequenceCost(
            build_layout(cu, kind=kind, sp_rank=rank, sp_size=num_ranks, ulysses=ulysses),
            linear,
            itemsize,
            recompute,
        )
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize(
    ("heads", "ranks", "padded"),
    [
        ((28, 4), 1, (28, 4)),
        ((28, 4), 4, (28, 4)),
        ((28, 4), 8, (32, 8)),
        ((28, 4), 16, (32, 16)),
        ((40, 8), 16, (48, 16)),
        ((6, 2), 3, (9, 3)),
        ((6, 2), 4, (8, 4)),
        ((5, 5), 2, (6, 6)),
    ],
    ids=str,
)
def test_heads_are_padded_inside_their_groups(
    heads: tuple[int, int], ranks: int, padded: tuple[int, int]
) -> None:
    assert pad_heads(*heads, ranks) == padded


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("P", SIZES)
def test_even_shares_give_the_published_volumes(P: int, itemsize: int) -> None:
    S, Hq, Hkv, d, b, w = 4096, 28, 4, 16, itemsize, 100
    n = S // P
    Hp = {2: 28, 4: 28, 8: 32}[P]
    for rank in range(P):
        cost = costs([S], P, itemsize=b)[rank]
        ring = cost.attention(Hq, Hkv, d)
        keys = (P - 1) * 2 * n * Hkv * d * b
        assert ring == Traffic({RING: keys}, {RING: keys + P * 2 * n * Hkv * d * 4})
        halo = (w - 1) * 2 * Hkv * d * b
        assert cost.attention(Hq, Hkv, d, w) == Traffic(
            {HALO: halo if rank < P - 1 else 0}, {HALO: halo if rank else 0}
        )
        taps = 3 * 48 * b
        assert cost.short_conv(48, 4).forward == {HALO: taps if rank < P - 1 else 0}
        for transition, width in (("none", 0), ("scalar", 1), ("vector", 8), ("dense", 64)):
            gather = cost.recurrent(Hkv, 8, d, transition)
            assert gather.forward == {GATHER: (P - 1) * Hkv * (8 * d + width) * 4}
            assert gather.backward == {GATHER: (P - 1) * Hkv * 8 * d * 4}
        scan = costs([S], P, linear="scan", itemsize=b)[rank].recurrent(Hkv, 8, d, "vector")
        state = Hkv * 8 * d * 4
        assert scan.forward == {SCAN: state if rank < P - 1 else 0}
        assert scan.backward == {SCAN: state if rank else 0}
        both = costs([S], P, ulysses=P, itemsize=b)[rank].attention(Hq, Hkv, d)
        exchanged = (P - 1) * n * d * b * (2 * Hp + 2 * max(P, Hkv)) // P
        assert both == Traffic({ULYSSES: exchanged}, {ULYSSES: exchanged})


def test_published_table_of_a_layer_of_7_billion_parameters() -> None:
    """28 query heads on 4 states of 128 x 128, 131,072 tokens in bf16."""
    for P, ulysses, ring, gather in (
        (8, 293.6, (234.9, 771.8), (1.85, 12.95)),
        (32, 130.0, (260.0, 796.9), (8.19, 57.33)),
    ):
        cost, scan = (costs([131072], P, linear=x)[P // 2] for x in ("gather", "scan"))
        exchange = costs([131072], P, ulysses=P)[0].attention(28, 4, 128)
        assert exchange.forward == exchange.backward
        assert round(exchange.forward[ULYSSES] / 1e6, 1) == ulysses
        passed = cost.attention(28, 4, 128)
        assert round(passed.forward[RING] / 1e6, 1) == ring[0]
        assert round(passed.backward[RING] / 1e6, 1) == ring[1]
        assert round(cost.attention(28, 4, 128, 4096).forward[HALO] / 1e6, 2) == 8.39
        for heads, megabytes, kibibytes in ((4, gather[0], 256), (28, gather[1], 1792)):
            states = cost.recurrent(heads, 128, 128, "vector").forward[GATHER]
            assert round(states / 1e6, 2) == megabytes
            assert scan.recurrent(heads, 128, 128).forward[SCAN] == kibibytes * 1024


def test_window_longer_than_a_share_reaches_several_ranks() -> None:
    sent = [c.attention(2, 1, 1, 251).forward[HALO] // 4 for c in costs([400], 4, itemsize=2)]
    assert sent == [250, 150 + 50, 100, 0]
    back = [c.attention(2, 1, 1, 251).backward[HALO] // 4 for c in costs([400], 4, itemsize=2)]
    assert back == [0, 100, 200, 250]


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    ("ranks", "ulysses", "lengths"),
    [(3, 1, [101]), (4, 2, [20, 50, 1, 30]), (6, 3, [3, 97]), (5, 1, [9, 2])],
    ids=str,
)
def test_uneven_packed_layouts_count_every_token(
    kind: str, ranks: int, ulysses: int, lengths: list[int]
) -> None:
    every, window = costs(lengths, ranks, kind=kind, ulysses=ulysses, itemsize=1), 30
    layout = every[0].layout
    holder = {t: r for r, own in enumerate(layout.segments) for s in own for t in range(*bounds(s))}
    sent, returned = [0] * ranks, [0] * ranks
    for rank, segments in enumerate(layout.segments):
        for segment in segments:
            seen = {
                t
                for q in range(segment.start, segment.stop)
                for t in range(max(layout.document(q).start, q - window + 1), segment.start)
            }
            for token in seen:
                sent[holder[token]] += holder[token] != rank
                returned[rank] += holder[token] != rank
    total, places = sum(lengths), ranks // ulysses
    for rank, cost in enumerate(every):
        halo = cost.attention(6, 6, 1, window)
        assert (halo.forward[HALO], halo.backward[HALO]) == (12 * sent[rank], 12 * returned[rank])
        group = [r for r in range(ranks) if r // ulysses == rank // ulysses]
        following = [r for r in range(ranks) if r // ulysses == (rank // ulysses + 1) % places]
        own, near = layout.count(rank), sum(map(layout.count, group))
        full = cost.attention(6, 6, 1)
        passed = total - sum(map(layout.count, following))
        # 6 / ulysses heads of keys and as many of values.
        assert full.forward[RING] * ulysses == 12 * passed
        assert full.backward[RING] * ulysses == 12 * (passed + 4 * total)
        if ulysses > 1:
            each = 6 // ulysses
            heads_out, tokens_back = (ulysses - 1) * own * each, (near - own) * each
            assert full.forward[ULYSSES] == 3 * heads_out + tokens_back
            assert full.backward[ULYSSES] == heads_out + 3 * tokens_back


def bounds(segment) -> tuple[int, int]:
    return segment.start, segment.stop


def test_zigzag_sends_two_states_and_scan_does_not_grow_with_the_ranks() -> None:
    for ranks in SIZES:
        gather = costs([1600], ranks, kind="zigzag")[0].recurrent(2, 4, 8, "scalar")
        assert gather.forward == {GATHER: 2 * (ranks - 1) * 2 * (32 + 1) * 4}
        scan = [c.recurrent(2, 4, 8) for c in costs([1600], ranks, kind="zigzag", linear="scan")]
        # The last rank holds two neighbouring segments, between which nothing is sent; the last
        # segment of all is the first rank's.
        legs = [1, *[2] * (ranks - 2), 1]
        assert [s.forward[SCAN] for s in scan] == [n * 2 * 32 * 4 for n in legs]
        assert [s.backward[SCAN] for s in scan] == [n * 2 * 32 * 4 for n in legs]


def test_recomputation_repeats_the_all_to_all_alone() -> None:
    once = costs([160], 4, ulysses=2)[1].attention(4, 2, 8)
    twice = costs([160], 4, ulysses=2, recompute=True)[1].attention(4, 2, 8)
    assert twice.forward == once.forward
    assert twice.backward[RING] == once.backward[RING]
    assert twice.backward[ULYSSES] == once.backward[ULYSSES] + once.forward[ULYSSES]


def test_one_rank_sends_nothing() -> None:
    (cost,) = costs([100], 1)
    whole = cost.attention(4, 2, 8) + cost.attention(4, 2, 8, 9) + cost.short_conv(8, 4)
    assert whole + cost.recurrent(2, 8, 8) == Traffic()
    assert zero_traffic([[10]], num_ranks=1, zero_stage=2, micro_batches=2) == Traffic()


@pytest.mark.parametrize(
    ("stage", "gradients", "parameters"),
    [
        (0, {("dp", "all_reduce"): 2 * 2 * 4 * 45 // 3}, {}),
        # Groups are padded to twice the ranks: 42 to 42, 3 to 6.
        (1, {("dp", "all_reduce"): 240}, {("dp", "all_gather_into_tensor"): 2 * 4 * 16}),
        (2, {("dp", "all_reduce"): 2 * 240}, {("dp", "all_gather_into_tensor"): 2 * 4 * 16}),
        # Parameters are padded to the ranks: 32 to 33, 10 to 12, 3 to 3.
        (3, {("dp", "reduce_scatter_tensor"): 2 * 2 * 4 * 16}, {}),
    ],
)
def test_zero_stages(stage: int, gradients: dict, parameters: dict) -> None:
    traffic = zero_traffic([[32, 10], [3]], num_ranks=3, zero_stage=stage, micro_batches=2)
    assert traffic == Traffic(parameters, gradients)


def test_experts_are_summed_over_the_ranks_that_have_the_same_ones() -> None:
    one = {"zero_stage": 1, "micro_batches": 2, "axis": "edp"}
    assert zero_traffic([[], []], num_ranks=4, **one) == Traffic()
    assert zero_traffic([[8], [4]], num_ranks=1, **one) == Traffic()
    assert zero_traffic([[8], []], num_ranks=2, **one) == Traffic(
        {("edp", "all_gather_into_tensor"): 4 * 4}, {("edp", "all_reduce"): 4 * 8}
    )


@pytest.mark.parametrize("P", SIZES)
def test_even_routing_gives_the_published_volume(P: int) -> None:
    tokens, experts, row = 4096, 16, 7168
    demand = [[tokens // experts] * experts] * P
    way = (P - 1) * tokens * row // P
    counts = 3 * (P - 1) * (experts // P) * 8
    for rank in range(P):
        once = expert_traffic(demand, rank, row_bytes=row, passes=3)
        assert once == Traffic(
            {COUNTS: counts, DISPATCH: way, COMBINE: way}, {DISPATCH: way, COMBINE: way}
        )
        twice = expert_traffic(demand, rank, row_bytes=row, passes=3, recompute=True)
        assert twice.forward == once.forward
        assert twice.backward == {COUNTS: counts, DISPATCH: 2 * way, COMBINE: 2 * way}


@pytest.mark.parametrize("is_copied", [False, True])
def test_uneven_routing_counts_every_row(is_copied: bool) -> None:
    generator, P, local = torch.Generator().manual_seed(0), 3, 2
    demand = torch.randint(0, 50, (P, P * local), generator=generator)
    demand[1, 3:] = 0
    copied = torch.zeros_like(demand, dtype=torch.bool)
    if is_copied:
        copied[0, 4] = copied[2, 0] = copied[2, 3] = copied[1, 0] = True
    sent, received, lent = [0] * P, [0] * P, [0] * P
    for source, expert in itertools.product(range(P), range(P * local)):
        owner = expert // local
        if copied[source, expert]:
            lent[owner] += 1
        elif source != owner:
            sent[source] += int(demand[source, expert])
            received[owner] += int(demand[source, expert])
    for rank in range(P):
        traffic = expert_traffic(
            demand.tolist(),
            rank,
            row_bytes=10,
            passes=1,
            copied=copied.tolist() if is_copied else None,
            expert_bytes=(700, 1400),
        )
        rows = {DISPATCH: 10 * sent[rank], COMBINE: 10 * received[rank]}
        borrowed = int(copied[rank].sum())
        copies = lent[rank] or borrowed
        out, back = ({COPY: 700 * lent[rank]}, {COPY: 1400 * borrowed}) if copies else ({}, {})
        assert traffic == Traffic({COUNTS: 2 * 2 * 8, **rows, **out}, {**rows, **back})
    assert sum(sent) == sum(received) > 0


def test_copies_of_the_busiest_expert_spare_its_rank() -> None:
    demand, copied = [[1000, 0, 0, 0]] * 4, [[rank > 0, False, False, False] for rank in range(4)]

    def busiest(copied: list[list[bool]] | None) -> int:
        traffics = [
            expert_traffic(
                demand, rank, row_bytes=64, passes=1, copied=copied, expert_bytes=(10_000, 20_000)
            )
            for rank in range(4)
        ]
        return max(sum((*t.forward.values(), *t.backward.values())) for t in traffics)

    counts = 3 * 8
    assert busiest(None) == counts + 2 * 3 * 1000 * 64
    assert busiest(copied) == counts + 3 * 10_000
