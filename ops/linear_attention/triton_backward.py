"""Kernels of the gradients of linear attention, chunk by chunk.

With S the state that enters a chunk, dS the gradient of the state that leaves it (the scan of
`triton_forward.py` in reverse) and b the decay summed inside the chunk,

    dlog_decay_t = sum over s >= t of (q dq - k dk)_s inside the chunk + sum over s >= t of
        (q dq_S)_s + sum over s < t of (k dk_dS)_s + exp(b_C) sum over v of S dS

where dq_S and dk_dS are what S and dS contribute (section 3 of arXiv:2312.06635, less the terms
that cancel).
"""

import triton
import triton.language as tl

from ops.linear_attention.triton_forward import (
    NONE,
    SCALAR,
    VECTOR,
    compute_scores,
    double_blocks,
    load_decay,
    load_decay_behind,
    load_rows,
    load_state,
    store_rows,
    weigh_level,
    weigh_pairs,
)


@triton.jit
def _linear_attention_bwd_v_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_g,
    p_dout,
    p_dstates,
    p_dv,
    p_chunks,
    scale,
    H,
    group,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Compute dv of a chunk and state head. H counts query heads."""
    chunk, state, H_state = tl.program_id(0), tl.program_id(1), H // group
    cols_v = tl.program_id(2) * BV + tl.arange(0, BV)
    stop = tl.load(p_chunks + 2 * chunk + 1)
    rows = tl.load(p_chunks + 2 * chunk).to(tl.int64) + tl.arange(0, C)
    b_dv = tl.zeros([C, BV], tl.float32)
    for first in range(0, D_K, BK):
        cols = first + tl.arange(0, BK)
        b_k = load_rows(p_k, rows, stop, state, H_state, cols, D_K)
        if DECAY != NONE:
            b_rest = load_decay_behind(p_g, rows, stop, state, H_state, cols, D_K, DECAY)
            b_k *= tl.exp(b_rest)
        b_ds = load_state(p_dstates, chunk, state, H_state, cols, cols_v, D_K, D_V)
        b_dv = tl.dot(b_k.to(DOT), b_ds.to(DOT), b_dv, input_precision="ieee")
    for member in range(0, group):
        head = state * group + member
        b_scores, b_own = compute_scores(
            p_q, p_k, p_g, rows, stop, head, group, H, D_K, C, LEVELS, DECAY, DOT, BK
        )
        b_dout = scale * load_rows(p_dout, rows, stop, head, H, cols_v, D_V)
        b_dv += b_own[:, None] * b_dout
        b_scores = tl.trans(b_scores.to(DOT))
        b_dv = tl.dot(b_scores, b_dout.to(DOT), b_dv, input_precision="ieee")
    store_rows(p_dv, b_dv, rows, stop, state, H_state, cols_v, D_V)


@triton.jit
def compute_dscores(  # type: ignore[no-untyped-def]
    p_dout,
    p_v,
    p_states,
    chunk,
    rows,
    stop,
    head,
    group,
    H,
    cols_k,
    scale,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Return dout v^T [C, C], its diagonal and dout S^T [C, BK], scaled, of a query head."""
    b_dscores, b_own = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    b_dq = tl.zeros([C, BK], tl.float32)
    for first in range(0, D_V, BV):
        cols = first + tl.arange(0, BV)
        b_dout = load_rows(p_dout, rows, stop, head, H, cols, D_V)
        b_v = load_rows(p_v, rows, stop, head // group, H // group, cols, D_V)
        b_own += tl.sum(b_dout * b_v, 1)
        b_dout, b_v = b_dout.to(DOT), b_v.to(DOT)
        b_dscores = tl.dot(b_dout, tl.trans(b_v), b_dscores, input_precision="ieee")
        b_s = load_state(p_states, chunk, head // group, H // group, cols_k, cols, D_K, D_V)
        b_dq = tl.dot(b_dout, tl.trans(b_s.to(DOT)), b_dq, input_precision="ieee")
    return scale * b_dscores, scale * b_own, scale * b_dq


@triton.jit
def spread_dscores(  # type: ignore[no-untyped-def]
    b_dq, b_dk, b_db, b_dscores, b_q, b_k, b_g, C: tl.constexpr, LEVELS: tl.constexpr, DOT
):
    """Add dq, dk and q dq - k dk of the scores below the diagonal, with a decay of each channel.

    The difference multiplies what the products did, rounded alike, so that pairs of tokens behind
    a gate cancel.
    """
    b_before, b_behind = b_g, tl.zeros_like(b_g)
    for level in range(0, LEVELS):
        b_weight, meet = weigh_level(b_before, b_behind, level, C)
        b_pairs = tl.where(meet, b_dscores, 0.0).to(DOT)
        b_left, b_right = (b_q * b_weight).to(DOT), (b_k * b_weight).to(DOT)
        b_dleft = tl.dot(b_pairs, b_right, input_precision="ieee")
        b_dq += b_dleft * b_weight
        b_db += b_left.to(tl.float32) * b_dleft
        b_dright = tl.dot(tl.trans(b_pairs), b_left, input_precision="ieee")
        b_dk += b_dright * b_weight
        b_db -= b_right.to(tl.float32) * b_dright
        b_before, b_behind = double_blocks(b_before, b_behind, level, C)
    return b_dq, b_dk, b_db


@triton.jit
def _linear_attention_bwd_qk_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_v,
    p_g,
    p_dout,
    p_states,
    p_dstates,
    p_dq,
    p_dk,
    p_dg,
    p_chunks,
    scale,
    num_tokens,
    H,
    group,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Compute dq, dk and dlog_decay of a chunk, state head and block of channels.

    Scalar decay: dg [blocks, tokens, H_state] is summed over the blocks afterwards.
    """
    chunk, state, H_state = tl.program_id(0), tl.program_id(1), H // group
    cols = tl.program_id(2) * BK + tl.arange(0, BK)
    stop = tl.load(p_chunks + 2 * chunk + 1)
    rows = tl.load(p_chunks + 2 * chunk).to(tl.int64) + tl.arange(0, C)
    b_k = load_rows(p_k, rows, stop, state, H_state, cols, D_K)
    b_dk, b_db = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    if DECAY != NONE:
        b_g = load_decay(p_g, rows, stop, state, H_state, cols, D_K, DECAY)
    if DECAY != VECTOR:
        b_weight = weigh_pairs(p_g, rows, stop, state, H_state, C, DECAY)
    for member in range(0, group):
        head = state * group + member
        b_q = load_rows(p_q, rows, stop, head, H, cols, D_K)
        b_dscores, b_own, b_dq = compute_dscores(
            p_dout, p_v, p_states, chunk, rows, stop, head, group, H, cols, scale,
            D_K, D_V, C, DOT, BK, BV,
        )  # fmt: skip
        if DECAY != NONE:
            b_dq *= tl.exp(tl.cumsum(b_g, 0))
            b_db += b_q * b_dq
        if DECAY == VECTOR:
            b_dq += b_own[:, None] * b_k
            b_dk += b_own[:, None] * b_q
            b_dq, b_dk, b_db = spread_dscores(
                b_dq, b_dk, b_db, b_dscores, b_q, b_k, b_g, C, LEVELS, DOT
            )
        else:
            b_pairs = (b_dscores * b_weight).to(DOT)
            b_inner_q = tl.dot(b_pairs, b_k.to(DOT), input_precision="ieee")
            b_inner_k = tl.dot(tl.trans(b_pairs), b_q.to(DOT), input_precision="ieee")
            b_dq, b_dk = b_dq + b_inner_q, b_dk + b_inner_k
            if DECAY == SCALAR:
                b_db += b_q * b_inner_q - b_k * b_inner_k
        store_rows(p_dq, b_dq, rows, stop, head, H, cols, D_K)

    b_dk_state, b_total = tl.zeros([C, BK], tl.float32), tl.zeros([BK], tl.float32)
    for first in range(0, D_V, BV):
        cols_v = first + tl.arange(0, BV)
        b_v = load_rows(p_v, rows, stop, state, H_state, cols_v, D_V)
        b_ds = load_state(p_dstates, chunk, state, H_state, cols, cols_v, D_K, D_V)
        b_dk_state = tl.dot(b_v.to(DOT), tl.trans(b_ds.to(DOT)), b_dk_state, input_precision="ieee")
        if DECAY != NONE:
            b_s = load_state(p_states, chunk, state, H_state, cols, cols_v, D_K, D_V)
            b_total += tl.sum(b_s * b_ds, 1)
    if DECAY != NONE:
        b_rest = load_decay_behind(p_g, rows, stop, state, H_state, cols, D_K, DECAY)
        b_dk_state *= tl.exp(b_rest)
        b_kdk = b_k * b_dk_state
        b_dg = tl.cumsum(b_db, 0, reverse=True) + tl.cumsum(b_kdk, 0) - b_kdk
        b_dg += b_total[None, :] * tl.exp(tl.sum(b_g, 0))[None, :]
        if DECAY == VECTOR:
            store_rows(p_dg, b_dg, rows, stop, state, H_state, cols, D_K)
        else:
            p_dg += tl.program_id(2).to(tl.int64) * num_tokens * H_state
            tl.store(p_dg + rows * H_state + state, tl.sum(b_dg, 1), mask=rows < stop)
    store_rows(p_dk, b_dk + b_dk_state, rows, stop, state, H_state, cols, D_K)
