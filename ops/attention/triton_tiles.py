"""Rows of one head, loaded and stored as tiles [rows, BLOCK_D]."""

import triton
import triton.language as tl


@triton.jit
def load_rows(  # type: ignore[no-untyped-def]
    p_x,
    start,
    limit,
    stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Load rows of D values from row `start` on as [ROWS, BLOCK_D]; CLAMP: up to `limit`.

    The rows from there on repeat the last one, which costs no predicates; scores hide them.
    """
    row, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    if CLAMP:
        row = tl.minimum(row, limit - 1 - start)
    # One 64-bit address for the tile; the offsets inside it fit in 32 bits.
    p_rows = p_x + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + d[None, :])
    b_x = tl.load(p_rows, mask=(d < D)[None, :], other=0.0) if D < BLOCK_D else tl.load(p_rows)
    return b_x.to(DTYPE)


@triton.jit
def store_rows(  # type: ignore[no-untyped-def]
    p_x, b_x, start, limit, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    """Store [ROWS, BLOCK_D] as rows of D values from row `start` up to `limit`."""
    row, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    p_rows = p_x + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + d[None, :])
    inside = (start + row < limit)[:, None]
    if D < BLOCK_D:
        inside &= (d < D)[None, :]
    tl.store(p_rows, b_x.to(p_x.dtype.element_ty), mask=inside)
