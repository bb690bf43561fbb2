"""Which queries and keys meet, as a table that the attention kernels read.

Every key is seen by one run of queries: those of its document where it is open to all (a sink;
without causal every key), else from itself to the end of its window. Every query sees its
document's open keys and a band that ends with itself. So a tile is masked by two numbers for each
of its keys. A block of queries meets three ranges of keys with a mask and a block of keys two of
queries; between the last two lies one of whole blocks that needs none.
"""

import torch
import triton
import triton.language as tl

from ops.attention.settings import Settings

# Rows of the table. As a key: the first query that sees it, how many do, and the end of those
# that would if the key were not open.
FIRST, COUNT, BAND_STOP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# As a query: its document's start, the end of the open keys before the band, the start of the
# band, and the end of all it sees.
START, OPEN_STOP, BAND, STOP = (tl.constexpr(row) for row in (3, 4, 5, 6))
NUM_ROWS = 7
TABLE_BLOCK = 1024


def build_table(q: torch.Tensor, k: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Return the table [7, max(T, T_k)], int32, for q [B, T, ...] and k [B, T_k, ...]."""
    num_keys = k.shape[1]
    size = max(q.shape[1], num_keys)
    starts = ends = None
    if settings.documents is not None:
        cuts = torch.tensor(settings.documents, dtype=torch.int32, device=q.device)
        pairs = torch.stack((cuts[:-1], cuts[1:]))
        starts, ends = pairs.repeat_interleave(cuts.diff(), dim=1, output_size=size)
    num_open = settings.count_open_keys(num_keys)
    window = size if settings.window_size is None else min(settings.window_size, size)
    table = torch.empty(NUM_ROWS, size, dtype=torch.int32, device=q.device)
    _attention_table_kernel[(triton.cdiv(size, TABLE_BLOCK),)](
        starts, ends, table, size, num_keys, num_open, window, BLOCK=TABLE_BLOCK
    )
    return table


@triton.jit
def _attention_table_kernel(  # type: ignore[no-untyped-def]
    p_starts, p_ends, p_table, size, num_keys, num_open, window, BLOCK: tl.constexpr
):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < size
    start, end = tl.zeros_like(t), tl.zeros_like(t) + size
    if p_starts is not None:
        start = tl.load(p_starts + t, mask=inside, other=0)
        end = tl.load(p_ends + t, mask=inside, other=0)
    open_stop = start + num_open
    band_stop, band = tl.minimum(end, t + window), tl.maximum(start, t - window + 1)
    first = tl.where(t < open_stop, start, t)
    tl.store(p_table + FIRST * size + t, first, mask=inside)
    stop = tl.where(t < open_stop, end, band_stop)
    tl.store(p_table + COUNT * size + t, stop - first, mask=inside)
    tl.store(p_table + BAND_STOP * size + t, band_stop, mask=inside)
    tl.store(p_table + START * size + t, start, mask=inside)
    tl.store(p_table + OPEN_STOP * size + t, tl.minimum(band, open_stop), mask=inside)
    tl.store(p_table + BAND * size + t, band, mask=inside)
    stop = tl.minimum(tl.minimum(end, num_keys), tl.maximum(t + 1, open_stop))
    tl.store(p_table + STOP * size + t, stop, mask=inside)


@triton.jit
def find_queries(s, limit, p_table, size):  # type: ignore[no-untyped-def]
    """Return the first query that sees each key and how many do; none the keys from `limit`."""
    inside = tl.minimum(s, limit - 1)
    # The shifted sign is all ones below the limit: predicates are scarce on AMD.
    count = tl.load(p_table + COUNT * size + inside) & ((s - limit) >> 31)
    return tl.load(p_table + FIRST * size + inside), count


@triton.jit
def is_seen(t, first, count):  # type: ignore[no-untyped-def]
    """Return whether query t is one of `count` from `first` on, by a single comparison."""
    return (t - first).to(tl.uint32) < count.to(tl.uint32)


@triton.jit
def find_key_ranges(  # type: ignore[no-untyped-def]
    t0, num_queries, p_table, size, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the keys that ROWS queries from t0 on meet, as bounds that rise in three pairs.

    The open keys before the band, the band before its inner part, and what follows that part,
    which is a whole number of blocks that all the queries see. Bounds rise from query to query,
    so the first and the last one tell.
    """
    t1 = tl.minimum(t0 + ROWS, num_queries) - 1
    start, open_stop = (
        tl.load(p_table + START * size + t0),
        tl.load(p_table + OPEN_STOP * size + t0),
    )
    band, stop = tl.load(p_table + BAND * size + t0), tl.load(p_table + STOP * size + t1)
    last_band = tl.load(p_table + BAND * size + t1)
    least_stop = tl.load(p_table + STOP * size + t0)
    inner, inner_stop = _fit_blocks(band, last_band, least_stop, BLOCK)
    return start, open_stop, band, inner, inner_stop, stop


@triton.jit
def find_query_ranges(  # type: ignore[no-untyped-def]
    s0, num_queries, num_keys, p_table, size, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the queries that ROWS keys from s0 on meet, as bounds that rise in two pairs.

    What comes before and after the inner part, a whole number of blocks that see all the keys.
    """
    s1 = tl.minimum(s0 + ROWS, num_keys) - 1
    begin = tl.load(p_table + FIRST * size + s0)
    last = tl.load(p_table + FIRST * size + s1)
    stop = last + tl.load(p_table + COUNT * size + s1)
    # The first key of the last document may be open and thus seen further than the last one.
    s = tl.maximum(s0, tl.load(p_table + START * size + s1))
    open_stop = tl.load(p_table + FIRST * size + s) + tl.load(p_table + COUNT * size + s)
    stop = tl.minimum(tl.maximum(stop, open_stop), num_queries)
    least_stop = tl.minimum(tl.load(p_table + BAND_STOP * size + s0), stop)
    inner, inner_stop = _fit_blocks(begin, last, least_stop, BLOCK)
    return begin, inner, inner_stop, stop


@triton.jit
def pick_masked(i, a, a_stop, b, b_stop, c, c_stop, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the start of masked block i, counted through three ranges, and its range's end."""
    j = i - tl.cdiv(a_stop - a, BLOCK)
    k = j - tl.cdiv(b_stop - b, BLOCK)
    start = tl.where(j < 0, a + i * BLOCK, tl.where(k < 0, b + j * BLOCK, c + k * BLOCK))
    return start, tl.where(j < 0, a_stop, tl.where(k < 0, b_stop, c_stop))


@triton.jit
def count_masked(a, a_stop, b, b_stop, c, c_stop, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return how many blocks three ranges have."""
    return tl.cdiv(a_stop - a, BLOCK) + tl.cdiv(b_stop - b, BLOCK) + tl.cdiv(c_stop - c, BLOCK)


@triton.jit
def _fit_blocks(outer, first, stop, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Fit whole blocks between first and stop; where there are none, put them at `outer`."""
    count = tl.maximum(stop - first, 0) // BLOCK
    first = tl.where(count > 0, first, outer)
    return first, first + count * BLOCK
