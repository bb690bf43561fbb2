"""Backward attention on NVIDIA and AMD: one kernel for dk and dv, one for dq, without atomics.

With p = exp(scale q k - lse), ds = p (v dout - delta) and delta = rowsum(dout out) - dlse:
dv = p dout, dk = scale ds q, dq = scale ds k (appendix B of arXiv:2307.08691). A block of keys
passes the queries of all heads of its group, a block of queries the keys that it sees.
"""

import torch
import triton
import triton.language as tl

from ops.attention.triton_forward import LOG2_E, name_kernel
from ops.attention.triton_tiles import load_rows, store_rows
from ops.attention.triton_visibility import (
    count_masked,
    find_key_ranges,
    find_queries,
    find_query_ranges,
    is_seen,
    pick_masked,
)
from ops.triton_runtime import Blocks, dot_dtype, find_blocks


def attend_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    table: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk, dv in the shapes and the dtype of q, k, v.

    Args:
        dout, q, out: [B, T, H, D], contiguous.
        dlse, lse: [B, H, T], float32, contiguous.
        k, v: [B, T_k, H_kv, D], contiguous.
        table, scale: as in `triton_forward.attend`.
    """
    (B, T, H, D), (T_k, H_kv) = q.shape, k.shape[1:3]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    BLOCK_D = max(16, triton.next_power_of_2(D))

    def settings(kernel: str) -> Blocks:
        return find_blocks("attention", kernel, BLOCK_D, q.device)

    blocks = settings("attention_bwd_delta")
    grid = (B * H * triton.cdiv(T, blocks["BLOCK_Q"]),)
    _attention_bwd_delta_kernel[grid](dout, out, dlse, delta, T, H, D=D, BLOCK_D=BLOCK_D, **blocks)
    inputs = (q, k, v, table, dout, lse, delta)
    sizes = (scale, T, T_k, H, H // H_kv, table.shape[1])
    constants = {"D": D, "BLOCK_D": BLOCK_D, "DOT": dot_dtype(q)}
    blocks = settings(name_kernel("attention_bwd_keys", q.dtype))
    _attention_bwd_keys_kernel[(B * H_kv * triton.cdiv(T_k, blocks["BLOCK_K"]),)](
        *inputs, dk, dv, *sizes, **constants, **blocks
    )
    blocks = settings(name_kernel("attention_bwd_queries", q.dtype))
    _attention_bwd_queries_kernel[(B * H * triton.cdiv(T, blocks["BLOCK_Q"]),)](
        *inputs, dq, *sizes, **constants, **blocks
    )
    return dq, dk, dv


@triton.jit
def _attention_bwd_delta_kernel(  # type: ignore[no-untyped-def]
    p_dout,
    p_out,
    p_dlse,
    p_delta,
    num_queries,
    num_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    num_blocks = tl.cdiv(num_queries, BLOCK_Q)
    t0 = tl.program_id(0) % num_blocks * BLOCK_Q
    t = t0 + tl.arange(0, BLOCK_Q)
    row_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    stride = num_heads * D
    offset = row_head // num_heads * num_queries * stride + row_head % num_heads * D
    b_dout = load_rows(
        p_dout + offset, t0, num_queries, stride, D, BLOCK_D, BLOCK_Q, tl.float32, True
    )
    b_out = load_rows(
        p_out + offset, t0, num_queries, stride, D, BLOCK_D, BLOCK_Q, tl.float32, True
    )
    delta = tl.sum(b_dout * b_out, 1)
    row = row_head * num_queries + t
    if p_dlse is not None:
        delta -= tl.load(p_dlse + row, mask=t < num_queries, other=0.0)
    tl.store(p_delta + row, delta, mask=t < num_queries)


@triton.jit
def _attention_bwd_keys_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_v,
    p_table,
    p_dout,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
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
    num_blocks, num_kv_heads = tl.cdiv(num_keys, BLOCK_K), num_heads // group
    s0 = tl.program_id(0) % num_blocks * BLOCK_K
    s = s0 + tl.arange(0, BLOCK_K)
    row_head = (tl.program_id(0) // num_blocks).to(tl.int64)  # of k and v; the first of its group
    row, head = row_head // num_kv_heads, row_head % num_kv_heads * group
    stride, kv_stride = num_heads * D, num_kv_heads * D
    kv_offset = row * num_keys * kv_stride + head // group * D
    p_q += row * num_queries * stride + head * D
    p_dout += row * num_queries * stride + head * D
    p_lse += row_head * group * num_queries
    p_delta += row_head * group * num_queries

    b_k = load_rows(p_k + kv_offset, s0, num_keys, kv_stride, D, BLOCK_D, BLOCK_K, DOT, True)
    b_v = load_rows(p_v + kv_offset, s0, num_keys, kv_stride, D, BLOCK_D, BLOCK_K, DOT, True)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    first, count = find_queries(s, num_keys, p_table, size)
    a, inner, inner_stop, b_stop = find_query_ranges(
        s0, num_queries, num_keys, p_table, size, BLOCK_K, BLOCK_Q
    )
    num_masked = count_masked(a, inner, inner_stop, b_stop, 0, 0, BLOCK_Q)
    for _ in range(group):
        for i in range(num_masked):
            start, limit = pick_masked(i, a, inner, inner_stop, b_stop, 0, 0, BLOCK_Q)
            t = start + tl.arange(0, BLOCK_Q)
            b_q = load_rows(p_q, start, limit, stride, D, BLOCK_D, BLOCK_Q, DOT, True)
            b_dout = load_rows(p_dout, start, limit, stride, D, BLOCK_D, BLOCK_Q, DOT, True)
            inside = tl.minimum(t, limit - 1)
            lse, delta = tl.load(p_lse + inside), tl.load(p_delta + inside)
            t = tl.where(t < limit, t, -1)  # not seen
            x = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * (scale * LOG2_E)
            x = tl.where(is_seen(t[None, :], first[:, None], count[:, None]), x, float("-inf"))
            dk, dv = _add_queries(dk, dv, x, b_q, b_dout, b_v, lse, delta, DOT)
        for start in range(inner, inner_stop, BLOCK_Q):
            t = start + tl.arange(0, BLOCK_Q)
            b_q = load_rows(p_q, start, inner_stop, stride, D, BLOCK_D, BLOCK_Q, DOT, False)
            b_dout = load_rows(p_dout, start, inner_stop, stride, D, BLOCK_D, BLOCK_Q, DOT, False)
            lse, delta = tl.load(p_lse + t), tl.load(p_delta + t)
            x = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * (scale * LOG2_E)
            dk, dv = _add_queries(dk, dv, x, b_q, b_dout, b_v, lse, delta, DOT)
        p_q, p_dout = p_q + D, p_dout + D
        p_lse, p_delta = p_lse + num_queries, p_delta + num_queries

    store_rows(p_dk + kv_offset, dk * scale, s0, num_keys, kv_stride, D, BLOCK_D, BLOCK_K)
    store_rows(p_dv + kv_offset, dv, s0, num_keys, kv_stride, D, BLOCK_D, BLOCK_K)


@triton.jit
def _add_queries(dk, dv, x, b_q, b_dout, b_v, lse, delta, DOT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add what queries of scores x (base 2) [keys, queries] give to dk / scale and dv."""
    p = tl.exp2(x - (lse * LOG2_E)[None, :])
    dv = tl.dot(p.to(DOT), b_dout, dv, input_precision="ieee")
    dp = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(DOT), b_q, dk, input_precision="ieee"), dv


@triton.jit
def _attention_bwd_queries_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_v,
    p_table,
    p_dout,
    p_lse,
    p_delta,
    p_dq,
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
    t0 = (num_blocks - 1 - tl.program_id(0) % num_blocks) * BLOCK_Q
    t = t0 + tl.arange(0, BLOCK_Q)
    row_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    row, head = row_head // num_heads, row_head % num_heads
    stride, kv_stride = num_heads * D, num_heads // group * D
    offset = row * num_queries * stride + head * D
    p_k += row * num_keys * kv_stride + head // group * D
    p_v += row * num_keys * kv_stride + head // group * D

    b_q = load_rows(p_q + offset, t0, num_queries, stride, D, BLOCK_D, BLOCK_Q, DOT, True)
    b_dout = load_rows(p_dout + offset, t0, num_queries, stride, D, BLOCK_D, BLOCK_Q, DOT, True)
    statistics = row_head * num_queries + t
    lse = tl.load(p_lse + statistics, mask=t < num_queries, other=0.0)
    delta = tl.load(p_delta + statistics, mask=t < num_queries, other=0.0)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    a, a_stop, b, inner, inner_stop, c_stop = find_key_ranges(
        t0, num_queries, p_table, size, BLOCK_Q, BLOCK_K
    )
    for i in range(count_masked(a, a_stop, b, inner, inner_stop, c_stop, BLOCK_K)):
        start, limit = pick_masked(i, a, a_stop, b, inner, inner_stop, c_stop, BLOCK_K)
        s = start + tl.arange(0, BLOCK_K)
        b_k = load_rows(p_k, start, limit, kv_stride, D, BLOCK_D, BLOCK_K, DOT, True)
        b_v = load_rows(p_v, start, limit, kv_stride, D, BLOCK_D, BLOCK_K, DOT, True)
        first, count = find_queries(s, limit, p_table, size)
        x = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * LOG2_E)
        x = tl.where(is_seen(t[:, None], first[None, :], count[None, :]), x, float("-inf"))
        dq = _add_keys_backward(dq, x, b_dout, b_k, b_v, lse, delta, DOT)
    for start in range(inner, inner_stop, BLOCK_K):
        s = start + tl.arange(0, BLOCK_K)
        b_k = load_rows(p_k, start, inner_stop, kv_stride, D, BLOCK_D, BLOCK_K, DOT, False)
        b_v = load_rows(p_v, start, inner_stop, kv_stride, D, BLOCK_D, BLOCK_K, DOT, False)
        x = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * LOG2_E)
        dq = _add_keys_backward(dq, x, b_dout, b_k, b_v, lse, delta, DOT)

    store_rows(p_dq + offset, dq * scale, t0, num_queries, stride, D, BLOCK_D, BLOCK_Q)


@triton.jit
def _add_keys_backward(dq, x, b_dout, b_k, b_v, lse, delta, DOT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add what keys of scores x (base 2) [queries, keys] give to dq / scale."""
    p = tl.exp2(x - (lse * LOG2_E)[:, None])
    dp = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(DOT), b_k, dq, input_precision="ieee")
