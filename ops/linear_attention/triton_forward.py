"""Kernels of linear attention: the scan of the state over chunks, the output, one decoding step.

The chunk form of arXiv:2312.06635. With a decay of each channel, a chunk is halved, its halves are,
and so on: two tokens meet at the border that parts them first, and each brings the decay between
itself and that border. So every level of halving is one masked product of C x C, no exponent is
positive, and sums of decay are never subtracted, whatever the decay.
"""

import triton
import triton.language as tl

# Far below what exp can tell from zero, and sums of it stay finite, unlike those of -inf.
MIN_LOG_DECAY = tl.constexpr(-1e4)
NONE, SCALAR, VECTOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_rows(p_x, rows, stop, head, H, cols, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return rows of [tokens, H, D] as float32 [C, block], zero from row `stop` on."""
    inside = (rows < stop)[:, None] & (cols < D)[None, :]
    offsets = (rows * H + head)[:, None] * D + cols[None, :]
    return tl.load(p_x + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(p_x, b_x, rows, stop, head, H, cols, D: tl.constexpr):  # type: ignore[no-untyped-def]
    inside = (rows < stop)[:, None] & (cols < D)[None, :]
    offsets = (rows * H + head)[:, None] * D + cols[None, :]
    tl.store(p_x + offsets, b_x.to(p_x.dtype.element_ty), mask=inside)


@triton.jit
def load_decay(p_g, rows, stop, head, H, cols, D: tl.constexpr, DECAY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return log_decay as float32 [C, block] or, scalar, [C, 1]; zero from row `stop` on."""
    if DECAY == SCALAR:
        b_g = tl.load(p_g + rows * H + head, mask=rows < stop, other=0.0).to(tl.float32)[:, None]
    else:
        b_g = load_rows(p_g, rows, stop, head, H, cols, D)
    return tl.maximum(b_g, MIN_LOG_DECAY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_decay_behind(p_g, rows, stop, head, H, cols, D: tl.constexpr, DECAY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the decay from behind each token to the end of the chunk, shaped as `load_decay`."""
    b_next = load_decay(p_g, rows + 1, stop, head, H, cols, D, DECAY)
    return tl.cumsum(b_next, 0, reverse=True)


@triton.jit
def load_state(p_states, chunk, head, H, rows, cols, D_K: tl.constexpr, D_V: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a block of the state of a chunk, [n, H, D_K, D_V], as float32."""
    inside = (rows < D_K)[:, None] & (cols < D_V)[None, :]
    p_state = p_states + (chunk.to(tl.int64) * H + head) * D_K * D_V
    offsets = rows[:, None] * D_V + cols[None, :]
    return tl.load(p_state + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_state(p_states, b_s, chunk, head, H, rows, cols, D_K: tl.constexpr, D_V: tl.constexpr):  # type: ignore[no-untyped-def]
    inside = (rows < D_K)[:, None] & (cols < D_V)[None, :]
    p_state = p_states + (chunk.to(tl.int64) * H + head) * D_K * D_V
    offsets = rows[:, None] * D_V + cols[None, :]
    tl.store(p_state + offsets, b_s.to(p_states.dtype.element_ty), mask=inside)


@triton.jit
def double_blocks(b_before, b_behind, level, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Go from blocks of 2^level tokens to blocks of twice as many.

    Args:
        b_before: decay from the start of its block to each token, that of the token included.
        b_behind: decay from behind each token to the end of its block.
    """
    i = tl.arange(0, C)
    sibling = tl.broadcast_to((i ^ (1 << level))[:, None], b_before.shape)
    b_other = tl.gather(b_before + b_behind, sibling, 0)
    is_later = ((i >> level) & 1 == 1)[:, None]
    b_behind = tl.where(is_later, b_behind, b_behind + b_other)
    return tl.where(is_later, b_before + b_other, b_before), b_behind


@triton.jit
def weigh_level(b_before, b_behind, level, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return each token's decay to or from its border, and the pairs that meet at one."""
    block = tl.arange(0, C) >> level
    is_later = block & 1 == 1
    b_weight = tl.exp(tl.where(is_later[:, None], b_before, b_behind))
    sibling_behind = (block + 1) | -(block & 1)  # -1 where there is none
    return b_weight, block[:, None] == sibling_behind[None, :]


@triton.jit
def weigh_pairs(p_g, rows, stop, head, H, C: tl.constexpr, DECAY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the decay of each causal pair of a chunk, [C, C], without or with scalar decay."""
    i = tl.arange(0, C)
    b_weight = (i[:, None] >= i[None, :]).to(tl.float32)
    if DECAY == SCALAR:
        b_g = load_decay(p_g, rows, stop, head, H, i, 1, DECAY)
        b_sums = tl.cumsum(tl.where(i[:, None] > i[None, :], b_g, 0.0), 0)
        b_weight *= tl.exp(b_sums)
    return b_weight


@triton.jit
def compute_scores(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_g,
    rows,
    stop,
    head,
    group,
    H,
    D_K: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
    BK: tl.constexpr,
):
    """Return the decayed causal q k^T of a chunk and query head, float32 [C, C] and [C].

    With a decay of each channel the diagonal stands apart; otherwise the second result is zero.
    """
    b_scores, b_own = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for first in range(0, D_K, BK):
        cols = first + tl.arange(0, BK)
        b_q = load_rows(p_q, rows, stop, head, H, cols, D_K)
        b_k = load_rows(p_k, rows, stop, head // group, H // group, cols, D_K)
        if DECAY == VECTOR:
            b_own += tl.sum(b_q * b_k, 1)
            b_before = load_decay(p_g, rows, stop, head // group, H // group, cols, D_K, DECAY)
            b_behind = tl.zeros_like(b_before)
            for level in range(0, LEVELS):
                b_weight, meet = weigh_level(b_before, b_behind, level, C)
                b_left, b_right = (b_q * b_weight).to(DOT), (b_k * b_weight).to(DOT)
                b_pairs = tl.dot(b_left, tl.trans(b_right), input_precision="ieee")
                b_scores += tl.where(meet, b_pairs, 0.0)
                b_before, b_behind = double_blocks(b_before, b_behind, level, C)
        else:
            b_scores += tl.dot(b_q.to(DOT), tl.trans(b_k.to(DOT)), input_precision="ieee")
    if DECAY != VECTOR:
        b_scores *= weigh_pairs(p_g, rows, stop, head // group, H // group, C, DECAY)
    return b_scores, b_own


@triton.jit
def _linear_attention_scan_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_y,
    p_g,
    p_initial,
    p_states,
    p_final,
    p_chunks,
    p_offsets,
    scale,
    H,
    group,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    DOT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Run S <- decay S + scale x^T y over the chunks of a document, storing S before each.

    Forwards x, y are k, v, decayed to the end of the chunk; in reverse they are q, dout, decayed
    from its start, `group` heads of which share a state. H counts states.
    """
    document, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks_v = tl.cdiv(D_V, BV)
    cols_k = tl.program_id(2) // blocks_v * BK + tl.arange(0, BK)
    cols_v = tl.program_id(2) % blocks_v * BV + tl.arange(0, BV)
    first, end = tl.load(p_offsets + document), tl.load(p_offsets + document + 1)
    b_s = tl.zeros([BK, BV], tl.float32)
    if p_initial is not None:
        b_s = load_state(p_initial, document, head, H, cols_k, cols_v, D_K, D_V)
    # Inside a document chunks follow each other; an empty one has none to ask.
    first_token = tl.load(p_chunks + 2 * first, mask=first < end, other=0).to(tl.int64)
    end_token = tl.load(p_chunks + 2 * end - 1, mask=first < end, other=0)
    for step in range(first, end):
        chunk = first + end - 1 - step if REVERSE else step
        store_state(p_states, b_s, chunk, head, H, cols_k, cols_v, D_K, D_V)
        start = first_token + (chunk - first) * C
        stop, rows = tl.minimum(start + C, end_token), start + tl.arange(0, C)
        if DECAY != NONE:
            b_g = load_decay(p_g, rows, stop, head, H, cols_k, D_K, DECAY)
            b_s *= tl.exp(tl.sum(b_g, 0))[:, None]
            if REVERSE:
                b_weight = tl.exp(tl.cumsum(b_g, 0))
            else:
                b_rest = load_decay_behind(p_g, rows, stop, head, H, cols_k, D_K, DECAY)
                b_weight = tl.exp(b_rest)
        # Keys and values have one head for a state: there the loop over chunks is the inner one.
        for member in range(0, group if REVERSE else 1):
            b_x = load_rows(p_x, rows, stop, head * group + member, H * group, cols_k, D_K)
            b_y = load_rows(p_y, rows, stop, head * group + member, H * group, cols_v, D_V)
            if DECAY != NONE:
                b_x *= b_weight
            b_added = tl.dot(tl.trans(b_x.to(DOT)), b_y.to(DOT), input_precision="ieee")
            b_s += scale * b_added
    store_state(p_final, b_s, document, head, H, cols_k, cols_v, D_K, D_V)


@triton.jit
def _linear_attention_fwd_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_v,
    p_g,
    p_states,
    p_out,
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
    """Compute the output of a chunk and query head from the state that enters. H counts heads."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    state, H_state = head // group, H // group
    cols_v = tl.program_id(2) * BV + tl.arange(0, BV)
    stop = tl.load(p_chunks + 2 * chunk + 1)
    rows = tl.load(p_chunks + 2 * chunk).to(tl.int64) + tl.arange(0, C)
    b_scores, b_own = compute_scores(
        p_q, p_k, p_g, rows, stop, head, group, H, D_K, C, LEVELS, DECAY, DOT, BK
    )
    b_v = load_rows(p_v, rows, stop, state, H_state, cols_v, D_V)
    b_out = tl.dot(b_scores.to(DOT), b_v.to(DOT), input_precision="ieee")
    b_out += b_own[:, None] * b_v
    for first in range(0, D_K, BK):
        cols = first + tl.arange(0, BK)
        b_q = load_rows(p_q, rows, stop, head, H, cols, D_K)
        if DECAY != NONE:
            b_g = load_decay(p_g, rows, stop, state, H_state, cols, D_K, DECAY)
            b_q *= tl.exp(tl.cumsum(b_g, 0))
        b_s = load_state(p_states, chunk, state, H_state, cols, cols_v, D_K, D_V)
        b_out = tl.dot(b_q.to(DOT), b_s.to(DOT), b_out, input_precision="ieee")
    store_rows(p_out, scale * b_out, rows, stop, head, H, cols_v, D_V)


@triton.jit
def _linear_attention_step_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_v,
    p_g,
    p_state,
    p_out,
    scale,
    H,
    group,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    DECAY: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Advance one state in place and read it for its `group` query heads. H counts states."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols_k, cols_v = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    p_k += (row * H + head) * D_K
    p_v += (row * H + head) * D_V
    b_k = tl.load(p_k + cols_k, mask=cols_k < D_K, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + cols_v, mask=cols_v < D_V, other=0.0).to(tl.float32)
    b_s = load_state(p_state, row, head, H, cols_k, cols_v, D_K, D_V)
    if DECAY == SCALAR:
        b_s *= tl.exp(tl.load(p_g + row * H + head).to(tl.float32))
    if DECAY == VECTOR:
        p_g += (row * H + head) * D_K
        b_g = tl.load(p_g + cols_k, mask=cols_k < D_K, other=0.0).to(tl.float32)
        b_s *= tl.exp(b_g)[:, None]
    b_s += b_k[:, None] * b_v[None, :]
    store_state(p_state, b_s, row, head, H, cols_k, cols_v, D_K, D_V)
    for member in range(0, group):
        reader = (row * H + head) * group + member
        b_q = tl.load(p_q + reader * D_K + cols_k, mask=cols_k < D_K, other=0.0).to(tl.float32)
        b_out = scale * tl.sum(b_q[:, None] * b_s, 0)
        p_o = p_out + reader * D_V + cols_v
        tl.store(p_o, b_out.to(p_out.dtype.element_ty), mask=cols_v < D_V)
