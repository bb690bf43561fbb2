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
class Visibility:
    """Which keys of a document its queries see."""

    num_open: int
    """First keys that all queries see; where there are others, there are as many queries."""
    window: int
    """Keys of the causal band over the others that a query sees, its own included."""


@dataclass(frozen=True)
class _Tile:
    """Keys first to last, in the band or open to all queries."""

    first: int
    last: int
    in_band: bool


@dataclass(frozen=True)
class _Block:
    """Queries start to stop and the tiles they see."""

    start: int
    stop: int
    tiles: tuple[_Tile, ...]


@dataclass(frozen=True)
class _Operands:
    """What the products read, [heads, rows, columns]; rows of queries are (token, group head)."""

    queries: torch.Tensor
    queries_lse: torch.Tensor
    douts: torch.Tensor
    douts_delta: torch.Tensor
    keys: torch.Tensor
    """Times the largest power of two in the scale, which is exact."""
    keys_one: torch.Tensor
    values_one: torch.Tensor
    scale: float
    factor: float
    """scale over that power: 1 where the head size is a power of four."""


def attend_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    visibility: Visibility,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of attention within rows that are one document each.

    Args:
        dout, q, out: [B, T, H, D].
        dlse, lse: [B, H, T], float32 (lse of float64 inputs: float64).
        k, v: [B, T_k, H_kv, D].
        visibility: the keys that each query sees.
        scale: factor on the scores.

    Returns:
        dq, dk, dv in the shapes and the dtype of q, k, v.
    """
    (B, T, H, _), (T_k, H_kv) = q.shape, k.shape[1:3]
    group = H // H_kv
    size = max(1, min(T, TILE_QUERIES, TILE_COLUMNS // group))
    blocks = _cut_into_blocks(T, T_k, visibility, size)
    bias = _BandBias(size, visibility.window, group, q)
    area = size * group * max(tile.last - tile.first for block in blocks for tile in block.tiles)
    # Few heads at a time: what they need stays small, and in the cache where tiles are.
    at_once = max(1, TILE_COLUMNS * TILE_KEYS // area)
    num_rows, num_heads = min(B, max(1, at_once // H_kv)), min(H_kv, at_once)
    buffers = q.new_empty(2, num_rows * num_heads * area)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for row in range(0, B, num_rows):
        for head in range(0, H_kv, num_heads):
            rows, kv = slice(row, row + num_rows), slice(head, head + num_heads)
            heads = slice(kv.start * group, kv.stop * group)
            operands = _build_operands(
                dout[rows, :, heads],
                None if dlse is None else dlse[rows, heads],
                q[rows, :, heads],
                k[rows, :, kv],
                v[rows, :, kv],
                out[rows, :, heads],
                lse[rows, heads],
                scale,
            )
            totals = _sum_tiles(operands, blocks, bias, buffers)
            for grad, part, total in zip((dq, dk, dv), (heads, kv, kv), totals, strict=True):
                target = _split_heads(grad[rows, :, part], k[:, :, kv].shape[2])
                target.copy_(total.view(target.shape))
    return dq, dk, dv


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

    def add(self, x: torch.Tensor, block: _Block, tile: _Tile) -> None:
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


def _cut_into_blocks(T: int, T_k: int, visibility: Visibility, size: int) -> list[_Block]:
    num_open = visibility.num_open
    has_band = num_open < T_k
    split = num_open if has_band else 0
    starts = [*range(0, split, size), *range(split, T, size)]
    blocks = []
    for start, stop in zip(starts, [*starts[1:], T], strict=True):
        tiles = [_Tile(*keys, in_band=False) for keys in _cut_keys(0, num_open)]
        if has_band and start >= num_open:
            first = max(num_open, start - visibility.window + 1)
            tiles += [_Tile(*keys, in_band=True) for keys in _cut_keys(first, stop)]
        blocks.append(_Block(start, stop, tuple(tiles)))
    return blocks


def _cut_keys(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cut a range of keys evenly."""
    count = math.ceil((last - first) / TILE_KEYS)
    for i in range(count):
        yield first + (last - first) * i // count, first + (last - first) * (i + 1) // count


def _sum_tiles(
    operands: _Operands, blocks: list[_Block], bias: _BandBias, buffers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk, dv of the operands' heads, [heads, rows, D]."""
    group = operands.queries.shape[1] // blocks[-1].stop
    sum_dtype = torch.promote_types(operands.keys.dtype, torch.float32)
    dq = torch.empty_like(operands.queries)
    dk, dv = (torch.zeros_like(operands.keys, dtype=sum_dtype) for _ in range(2))
    for block in blocks:
        rows = slice(block.start * group, block.stop * group)
        queries, douts = _cut(operands.queries, rows), _cut(operands.douts, rows)
        parts = []
        for tile in block.tiles:
            keys = slice(tile.first, tile.last)
            p, ds = _compute_tile(operands, rows, block, tile, bias, buffers)
            dv[:, keys].add_(torch.bmm(p, douts))
            dk[:, keys].add_(torch.bmm(ds, queries))
            parts.append(torch.bmm(ds.mT, _cut(operands.keys, keys)))
        dq[:, rows] = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0, dtype=sum_dtype)
    if operands.factor != 1.0:
        dq *= operands.factor
    return dq, dk.mul_(operands.scale), dv


def _compute_tile(
    operands: _Operands,
    rows: slice,
    block: _Block,
    tile: _Tile,
    bias: _BandBias,
    buffers: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return p and ds, [heads, keys, rows], in the buffers."""
    keys = slice(tile.first, tile.last)
    queries_lse = _cut(operands.queries_lse, rows)
    douts_delta = _cut(operands.douts_delta, rows)
    shape = (queries_lse.shape[0], tile.last - tile.first, queries_lse.shape[1])
    p, ds = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
    torch.bmm(_cut(operands.keys_one, keys), queries_lse.mT, out=p)
    if operands.factor != 1.0:
        p *= operands.factor
    if tile.in_band:
        bias.add(p, block, tile)
    p.exp_()
    torch.bmm(_cut(operands.values_one, keys), douts_delta.mT, out=ds)
    ds *= p
    return p, ds


def _cut(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """Return x[:, rows]; of one head with strides from which bmm makes no copy."""
    return x[0, rows][None] if x.shape[0] == 1 else x[:, rows]


def _build_operands(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> _Operands:
    H_kv = k.shape[2]
    power = 2.0 ** math.floor(math.log2(scale)) if scale > 0 else 1.0
    queries, douts = _fold_heads(q, H_kv), _fold_heads(dout, H_kv)
    keys, values = _fold_heads(k * power, H_kv), _fold_heads(v, H_kv)
    # A product with ones: summing over so few columns is slow.
    delta = (dout.to(lse.dtype) * out) @ lse.new_ones(out.shape[3], 1)  # [B, T, H, 1]
    if dlse is not None:
        delta = delta - dlse.mT[..., None]
    lse_rows, delta_rows = _fold_heads(lse.mT[..., None], H_kv), _fold_heads(delta, H_kv)
    ones = lse.new_ones(*keys.shape[:2], 1)
    return _Operands(
        queries=queries,
        queries_lse=_append_column(queries, lse_rows / (-scale / power)),
        douts=douts,
        douts_delta=_append_column(douts, -delta_rows),
        keys=keys,
        keys_one=_append_column(keys, ones, is_repeated=True),
        values_one=_append_column(values, ones, is_repeated=True),
        scale=scale,
        factor=scale / power,
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


def _split_heads(x: torch.Tensor, H_kv: int) -> torch.Tensor:
    """View [B, T, H, D] as [B, H_kv, T, group, D]."""
    return x.unflatten(2, (H_kv, -1)).transpose(1, 2)


def _fold_heads(x: torch.Tensor, H_kv: int) -> torch.Tensor:
    """Return [B, T, H, D] as [B x H_kv, T x group, D]."""
    return _split_heads(x, H_kv).flatten(2, 3).flatten(0, 1)
