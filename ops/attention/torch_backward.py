"""Backward attention by tiles of keys x queries: matrix products and two passes over a tile.

With x = scale q k - lse, p = exp(x) and ds = p (v dout - delta), where delta is
rowsum(dout out) - dlse: dv = p dout, dk = scale ds q and dq = scale ds k (appendix B of
arXiv:2307.08691). The subtractions are part of the products: q carries -lse and dout carries
-delta as further columns, against ones in k and v. So p costs one pass over its tile and ds
another, and where x is rounded to 16 bits the error is relative to log p, not to the score.
"""

import math

import torch

from ops.attention.tiles import BandBias, Block, Tile, Visibility, cut_into_blocks

# Measured: smaller tiles drown in the overhead of calls, larger ones leave the cache.
TILE_COLUMNS = 768  # queries x heads of a group
TILE_QUERIES = 256  # tokens; the half of a causal tile beyond the diagonal is wasted
TILE_KEYS = 2048
COLUMN_MULTIPLE = 32  # of 16-bit values: the depth of a matrix tile of AMX


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
    blocks = cut_into_blocks(T, T_k, visibility, size, TILE_KEYS)
    bias = BandBias(size, visibility.window, group, q)
    area = size * group * max(tile.last - tile.first for block in blocks for tile in block.tiles)
    at_once = max(1, TILE_COLUMNS * TILE_KEYS // area)
    rows, heads = min(B, max(1, at_once // H_kv)), min(H_kv, at_once)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))

    def cut(x: torch.Tensor, row: int, head: int) -> torch.Tensor:
        """View heads of x [B, T, H or H_kv, ...] as [rows, heads of k, T, group, ...]."""
        x = x.unflatten(2, (H_kv, -1))[row : row + rows, :, head : head + heads]
        return x.transpose(1, 2)

    buffer = q.new_empty(2, rows * heads * area)
    for row in range(0, B, rows):
        for head in range(0, H_kv, heads):
            part = _Heads(
                *(cut(x, row, head) for x in (dout, q, k, v, out, lse.mT)),
                dlse=None if dlse is None else cut(dlse.mT, row, head),
                scale=scale,
            )
            totals = part.sum_blocks(blocks, bias, buffer)
            for grad, total in zip((dq, dk, dv), totals, strict=True):
                target = cut(grad, row, head)
                target.copy_(total.view(target.shape))
    return dq, dk, dv


class _Heads:
    """Some heads, in the layout of the products: [B x H_kv, rows, columns].

    A row of queries is (token, head of the group), so that the queries that share a key head are
    the columns of one tile.
    """

    def __init__(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        dlse: torch.Tensor | None,
        scale: float,
    ) -> None:
        """Copy the inputs, views [B, H_kv, T, group, D]."""
        # The power of two goes into k without error; the rest is 1 if D is a power of four.
        power = 2.0 ** math.floor(math.log2(scale)) if scale > 0 else 1.0
        self.scale, self.factor = scale, scale / power
        self.group, self.sum_dtype = q.shape[3], lse.dtype
        # A product with ones: summing over so few columns is slow.
        delta = (dout.to(lse.dtype) * out) @ lse.new_ones(out.shape[-1])
        if dlse is not None:
            delta = delta - dlse
        self.queries, self.douts = _fold(q), _fold(dout)
        self.keys, values = _fold(k * power), _fold(v)
        self.queries_lse = _append_column(self.queries, _fold(lse[..., None] / -self.factor))
        self.douts_delta = _append_column(self.douts, _fold(-delta[..., None]))
        ones = lse.new_ones(*self.keys.shape[:2], 1)
        self.keys_one = _append_column(self.keys, ones, is_repeated=True)
        self.values_one = _append_column(values, ones, is_repeated=True)

    def sum_blocks(
        self, blocks: list[Block], bias: BandBias, buffer: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return dq, dk and dv in the layout of queries and keys."""
        dq = torch.empty_like(self.queries)
        dk, dv = (torch.zeros_like(self.keys, dtype=self.sum_dtype) for _ in range(2))
        for block in blocks:
            rows = slice(block.start * self.group, block.stop * self.group)
            queries, douts = _cut(self.queries, rows), _cut(self.douts, rows)
            parts = []
            for tile in block.tiles:
                keys = slice(tile.first, tile.last)
                p, ds = self.compute_tile(block, rows, tile, bias, buffer)
                dv[:, keys].add_(torch.bmm(p, douts))
                dk[:, keys].add_(torch.bmm(ds, queries))
                parts.append(torch.bmm(ds.mT, _cut(self.keys, keys)))
            total = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0, dtype=self.sum_dtype)
            dq[:, rows] = total
        if self.factor != 1.0:
            dq *= self.factor
        return dq, dk.mul_(self.scale), dv

    def compute_tile(
        self, block: Block, rows: slice, tile: Tile, bias: BandBias, buffer: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return p and ds, [heads, keys, rows], in the buffer."""
        keys = slice(tile.first, tile.last)
        queries_lse, douts_delta = _cut(self.queries_lse, rows), _cut(self.douts_delta, rows)
        shape = (queries_lse.shape[0], tile.last - tile.first, queries_lse.shape[1])
        p, ds = (half[: math.prod(shape)].view(shape) for half in buffer)
        torch.bmm(_cut(self.keys_one, keys), queries_lse.mT, out=p)
        if self.factor != 1.0:
            p *= self.factor
        if tile.in_band:
            bias.add(p, block, tile)
        p.exp_()
        torch.bmm(_cut(self.values_one, keys), douts_delta.mT, out=ds)
        ds *= p
        return p, ds


def _fold(x: torch.Tensor) -> torch.Tensor:
    """Copy [B, H_kv, T, group, D] to [B x H_kv, T x group, D]."""
    return x.flatten(2, 3).flatten(0, 1)


def _cut(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """Return x[:, rows]; of one head with strides from which bmm makes no copy."""
    return x[0, rows][None] if x.shape[0] == 1 else x[:, rows]


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
