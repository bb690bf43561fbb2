"""Backward attention by tiles of keys x queries: matrix products and two passes over a tile.

With x = scale q k - lse, p = exp(x) and ds = p (v dout - delta), where delta is
rowsum(dout out) - dlse: dv = p dout, dk = scale ds q and dq = scale ds k (appendix B of
arXiv:2307.08691). The subtractions are part of the products: q carries -lse and dout carries
-delta as further columns, against ones in k and v. So p costs one pass over its tile and ds
another, and where x is rounded to 16 bits the error is relative to log p, not to the score.
Key heads are the batch of the products; the queries of their groups are the columns of a tile.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Measured on two cores: smaller tiles drown in the overhead of calls, larger ones leave the cache.
TILE_COLUMNS = 768  # queries x heads of a group
TILE_QUERIES = 256  # tokens; the half of a causal tile beyond the diagonal is wasted
TILE_KEYS = 2048
COLUMN_MULTIPLE = 32  # of 16-bit values: the depth of a matrix tile of AMX


@dataclass(frozen=True)
class _Tile:
    """Keys first to last, in the band or visible to all, against one block of queries."""

    first: int
    last: int
    in_band: bool


@dataclass(frozen=True)
class _Operands:
    """What the products read, [B x H_kv, rows, columns]; rows of queries are (token, head)."""

    queries: torch.Tensor
    queries_lse: torch.Tensor
    douts: torch.Tensor
    douts_delta: torch.Tensor
    keys: torch.Tensor
    """Times the largest power of two in the scale, which is exact."""
    keys_one: torch.Tensor
    values_one: torch.Tensor
    power: float
    factor: float
    """scale / power: 1 for head sizes that are a power of four."""


def attend_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    *,
    num_open: int,
    window_size: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of attention to the first num_open keys and a causal band over the rest.

    Args:
        dout, q: [B, T, H, D].
        k, v: [B, T_k, H_kv, D].
        lse, delta: [B, H, T], float32 (float64 for float64 inputs).
        num_open: keys that all queries see; with fewer than T_k, T is T_k.
        window_size: keys of the band that a query sees; None: all up to its own.
        scale: factor on the scores.

    Returns:
        dq, dk, dv in the shapes and the dtype of q, k, v.
    """
    (B, T, H, D), (T_k, H_kv) = q.shape, k.shape[1:3]
    group = H // H_kv
    window = T_k if window_size is None else min(window_size, T_k)
    operands = _build_operands(dout, q, k, v, lse, delta, scale)
    size = max(1, min(T, TILE_QUERIES, TILE_COLUMNS // group))
    blocks = list(_cut_into_tiles(T, T_k, num_open, window, size))
    bias = _BandBias(size, window, group, q)
    area = size * group * max(tile.last - tile.first for _, _, tiles in blocks for tile in tiles)
    heads = min(B * H_kv, max(1, TILE_COLUMNS * TILE_KEYS // area))
    buffers = q.new_empty(2, heads * area)
    dq = q.new_empty(B * H_kv, T * group, D)
    dk, dv = lse.new_zeros(2, B * H_kv, T_k, D)
    for head in range(0, B * H_kv, heads):
        batch = slice(head, head + heads)
        for start, stop, tiles in blocks:
            rows = slice(start * group, stop * group)
            total: torch.Tensor | None = None
            for tile in tiles:
                p, ds = _compute_tile(operands, batch, rows, tile, start, stop, bias, buffers)
                keys = slice(tile.first, tile.last)
                dv[batch, keys].add_(torch.bmm(p, operands.douts[batch, rows]))
                dk[batch, keys].add_(torch.bmm(ds, operands.queries[batch, rows]))
                part = torch.bmm(ds.mT, operands.keys[batch, keys])
                total = part if total is None else part + total.to(lse.dtype)
            dq[batch, rows] = total
    if operands.factor != 1.0:
        dq *= operands.factor
    dk *= scale
    return _unfold_heads(dq, q, H_kv), _unfold_heads(dk, k, H_kv), _unfold_heads(dv, v, H_kv)


class _BandBias:
    """Hides from the columns of a tile the keys later than they or before their window."""

    def __init__(self, size: int, window: int, group: int, like: torch.Tensor) -> None:
        self.window = window
        r = torch.arange(size, device=like.device)
        column = r.repeat_interleave(group)
        minus_inf = torch.full((), float("-inf"), dtype=like.dtype, device=like.device)
        zero = torch.zeros_like(minus_inf)
        self.later = torch.where(r[:, None] > column, minus_inf, zero)
        self.earlier = torch.where(r[:, None] < column, minus_inf, zero)

    def add(self, x: torch.Tensor, tile: _Tile, start: int, stop: int) -> None:
        """Add -inf to the hidden part of x [heads, keys, columns]; only where there is one."""
        columns = x.shape[2]
        # Row r of `later` is key start + r, row r of `earlier` key start + 1 - window + r.
        for bias, origin, end in (
            (self.later, start, tile.last),
            (self.earlier, start + 1 - self.window, min(tile.last, stop - self.window)),
        ):
            begin = max(origin, tile.first)
            if begin < end:
                hidden = bias[begin - origin : end - origin, :columns]
                x[:, begin - tile.first : end - tile.first].add_(hidden)


def _cut_into_tiles(
    T: int, T_k: int, num_open: int, window: int, size: int
) -> Iterator[tuple[int, int, list[_Tile]]]:
    """Yield the blocks of queries, each with its tiles of keys."""
    has_band = num_open < T_k
    split = num_open if has_band else 0
    starts = [*range(0, split, size), *range(split, T, size)]
    for start, stop in zip(starts, [*starts[1:], T], strict=True):
        tiles = [_Tile(*keys, in_band=False) for keys in _cut_keys(0, num_open)]
        if has_band and start >= num_open:
            first = max(num_open, start - window + 1)
            tiles += [_Tile(*keys, in_band=True) for keys in _cut_keys(first, stop)]
        yield start, stop, tiles


def _cut_keys(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cut a range of keys evenly."""
    size = math.ceil((last - first) / max(1, math.ceil((last - first) / TILE_KEYS)))
    for begin in range(first, last, size or 1):
        yield begin, min(begin + size, last)


def _compute_tile(
    operands: _Operands,
    batch: slice,
    rows: slice,
    tile: _Tile,
    start: int,
    stop: int,
    bias: _BandBias,
    buffers: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return p and ds, [heads, keys, rows], in the buffers."""
    keys = slice(tile.first, tile.last)
    queries_lse = operands.queries_lse[batch, rows]
    shape = (queries_lse.shape[0], tile.last - tile.first, queries_lse.shape[1])
    p, ds = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
    torch.bmm(operands.keys_one[batch, keys], queries_lse.mT, out=p)
    if operands.factor != 1.0:
        p *= operands.factor
    if tile.in_band:
        bias.add(p, tile, start, stop)
    p.exp_()
    torch.bmm(operands.values_one[batch, keys], operands.douts_delta[batch, rows].mT, out=ds)
    ds *= p
    return p, ds


def _build_operands(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
) -> _Operands:
    H_kv = k.shape[2]
    power = 2.0 ** math.floor(math.log2(scale)) if scale > 0 else 1.0
    factor = scale / power
    queries, douts = _fold_heads(q, H_kv), _fold_heads(dout, H_kv)
    keys, values = _fold_heads(k * power, H_kv), _fold_heads(v, H_kv)
    lse_rows, delta_rows = (_fold_heads(x.mT[..., None], H_kv) for x in (lse, delta))
    ones = torch.ones_like(keys[..., :1], dtype=lse.dtype)
    return _Operands(
        queries=queries,
        queries_lse=_append_column(queries, lse_rows / -factor),
        douts=douts,
        douts_delta=_append_column(douts, -delta_rows),
        keys=keys,
        keys_one=_append_column(keys, ones, is_repeated=True),
        values_one=_append_column(values, ones, is_repeated=True),
        power=power,
        factor=factor,
    )


def _append_column(
    x: torch.Tensor, column: torch.Tensor, is_repeated: bool = False
) -> torch.Tensor:
    """Append a column [heads, rows, 1] to x [heads, rows, D].

    In 16 bits it takes three, each with what the ones before it round off, or three times the
    same (is_repeated) on the side that picks them up.
    """
    is_short = x.dtype.itemsize == 2
    parts = 3 if is_short else 1
    width = x.shape[2] + parts
    if is_short:
        width = math.ceil(width / COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    tail = x.new_zeros(*x.shape[:2], width - x.shape[2])
    for part in range(parts):
        tail[..., part : part + 1] = column
        if not is_repeated:
            column = column - tail[..., part : part + 1]
    return torch.cat((x, tail), dim=2)


def _fold_heads(x: torch.Tensor, H_kv: int) -> torch.Tensor:
    """Lay [B, T, H, D] out as [B x H_kv, T x group, D]; always a copy."""
    folded = x.unflatten(2, (H_kv, -1)).transpose(1, 2)  # [B, H_kv, T, group, D]
    return folded.clone(memory_format=torch.contiguous_format).flatten(2, 3).flatten(0, 1)


def _unfold_heads(x: torch.Tensor, like: torch.Tensor, H_kv: int) -> torch.Tensor:
    """Return [B x H_kv, T x group, D] in the shape and dtype of `like` [B, T, H, D]."""
    B, T, _, D = like.shape
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    out.unflatten(2, (H_kv, -1)).copy_(x.view(B, H_kv, T, -1, D).transpose(1, 2))
    return out
