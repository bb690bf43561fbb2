"""Forward attention on NVIDIA and AMD: a program per block of queries and head.

Algorithm 1 of arXiv:2307.08691, with softmax in base 2: m, the sum and the output are rescaled as
blocks of keys pass. Keys that no query of the block sees are not visited.
"""

import torch
import triton
import triton.language as tl

from ops.attention.triton_tiles import load_rows, store_rows
from ops.attention.triton_visibility import (
    count_masked,
    find_key_ranges,
    find_queries,
    is_seen,
    pick_masked,
)
from ops.triton_runtime import dot_dtype, find_blocks

LOG2_E = tl.constexpr(1.4426950408889634)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, T, H, D] and lse [B, H, T], float32.

    Args:
        q, k, v: [B, T, H, D] and [B, T_k, H_kv, D], contiguous.
        table: which of them meet (`triton_visibility.build_table`).
        scale: factor on the scores.
    """
    (B, T, H, D), (T_k, H_kv) = q.shape, k.shape[1:3]
    out, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)
    BLOCK_D = max(16, triton.next_power_of_2(D))
    blocks = find_blocks("attention", name_kernel("attention_fwd", q.dtype), BLOCK_D, q.device)
    _attention_fwd_kernel[(B * H * triton.cdiv(T, blocks["BLOCK_Q"]),)](
        q,
        k,
        v,
        table,
        out,
        lse,
        scale,
        T,
        T_k,
        H,
        H // H_kv,
        table.shape[1],
        D=D,
        BLOCK_D=BLOCK_D,
        DOT=dot_dtype(q),
        **blocks,
    )
    return out, lse


def name_kernel(kernel: str, dtype: torch.dtype) -> str:
    """Return the kernel's name in the settings: float32 operands take twice the room."""
    return f"{kernel}_fp32" if dtype == torch.float32 else kernel


@triton.jit
def _attention_fwd_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_v,
    p_table,
    p_out,
    p_lse,
    scale,
    num_queries,
    num_keys,
    num_heads,
    group,
    size,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_blocks = tl.cdiv(num_queries, BLOCK_Q)
    # The last queries of a causal row see the most keys: they start first.
    t0 = (num_blocks - 1 - tl.program_id(0) % num_blocks) * BLOCK_Q
    t = t0 + tl.arange(0, BLOCK_Q)
    row_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    row, head = row_head // num_heads, row_head % num_heads
    stride, kv_stride = num_heads * D, num_heads // group * D
    p_q += row * num_queries * stride + head * D
    p_k += row * num_keys * kv_stride + head // group * D
    p_v += row * num_keys * kv_stride + head // group * D

    b_q = load_rows(p_q, t0, num_queries, stride, D, BLOCK_D, BLOCK_Q, DOT, True)
    factor = scale * LOG2_E
    m = tl.full([BLOCK_Q], -1e30, tl.float32)  # finite, so that rows without keys give no NaN
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    a, a_stop, b, inner, inner_stop, c_stop = find_key_ranges(
        t0, num_queries, p_table, size, BLOCK_Q, BLOCK_K
    )
    for i in range(count_masked(a, a_stop, b, inner, inner_stop, c_stop, BLOCK_K)):
        start, limit = pick_masked(i, a, a_stop, b, inner, inner_stop, c_stop, BLOCK_K)
        s = start + tl.arange(0, BLOCK_K)
        b_k = load_rows(p_k, start, limit, kv_stride, D, BLOCK_D, BLOCK_K, DOT, True)
        b_v = load_rows(p_v, start, limit, kv_stride, D, BLOCK_D, BLOCK_K, DOT, True)
        x = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * factor
        first, count = find_queries(s, limit, p_table, size)
        x = tl.where(is_seen(t[:, None], first[None, :], count[None, :]), x, float("-inf"))
        m, total, acc = _add_keys(m, total, acc, x, b_v, DOT)
    for start in range(inner, inner_stop, BLOCK_K):
        s = start + tl.arange(0, BLOCK_K)
        b_k = load_rows(p_k, start, inner_stop, kv_stride, D, BLOCK_D, BLOCK_K, DOT, False)
        b_v = load_rows(p_v, start, inner_stop, kv_stride, D, BLOCK_D, BLOCK_K, DOT, False)
        x = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * factor
        m, total, acc = _add_keys(m, total, acc, x, b_v, DOT)

    acc /= tl.where(total > 0, total, 1.0)[:, None]
    p_out += row * num_queries * stride + head * D
    store_rows(p_out, acc, t0, num_queries, stride, D, BLOCK_D, BLOCK_Q)
    lse = (m + tl.log2(total)) / LOG2_E
    tl.store(p_lse + row_head * num_queries + t, lse, mask=t < num_queries)


@triton.jit
def _add_keys(m, total, acc, x, b_v, DOT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add keys of scores x (base 2) to the running maximum, sum and output."""
    new_m = tl.maximum(m, tl.max(x, 1))
    p = tl.exp2(x - new_m[:, None])
    ratio = tl.exp2(m - new_m)
    acc = tl.dot(p.to(DOT), b_v, acc * ratio[:, None], input_precision="ieee")
    return new_m, total * ratio + tl.sum(p, 1), acc
