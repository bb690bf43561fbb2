"""Forward kernels of the delta rule, in the notation of `torch_impl.py`.

The first prepares W, T v and k exp(r) of every chunk from its A, the second scans the states and
turns T v into the errors E, the third reads. Rows of [tokens, H, D] arrays are numbered
token * H + head.
"""

import triton
import triton.language as tl

from ops.delta_rule.triton_scores import load_factors, load_rows, store_rows


@triton.jit
def _delta_rule_prepare_kernel(  # type: ignore[no-untyped-def]
    p_k, p_v, p_beta, p_decay, p_rest, p_chunks, p_scores,
    p_w, p_error, p_k_down, p_total, p_inverse, H,
    D_K: tl.constexpr, D_V: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, state heads); p_scores holds A; p_inverse (T) is for the backward pass."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, num_tokens = tl.load(p_chunks + 2 * chunk), tl.load(p_chunks + 2 * chunk + 1)
    b_t = tl.arange(0, C)
    b_rows, b_is_token = b_t * H, b_t < num_tokens
    row = start.to(tl.int64) * H + head
    p_k, p_w, p_k_down = p_k + row * D_K, p_w + row * D_K, p_k_down + row * D_K
    p_v, p_error, p_beta = p_v + row * D_V, p_error + row * D_V, p_beta + row
    p_decay += row * (D_K if VECTOR else 1)
    if p_rest is not None:
        p_rest += row * D_K
    b_beta = tl.load(p_beta + b_rows, mask=b_is_token, other=0.0).to(tl.float32)

    b_square = (chunk * H + head) * C * C + b_t[:, None] * C + b_t[None, :]
    b_scores = tl.load(p_scores + b_square).to(tl.float32)
    b_scores = tl.where(b_t[:, None] > b_t[None, :], b_scores, 0.0)
    b_inverse = _invert(b_scores * b_beta[None, :], C)
    if p_inverse is not None:
        tl.store(p_inverse + b_square, b_inverse.to(p_inverse.dtype.element_ty))
    b_inverse = b_inverse.to(DOT)
    for i in range(0, D_V, BV):
        b_channels = i + tl.arange(0, BV)
        b_v = load_rows(p_v, b_rows, b_is_token, D_V, b_channels).to(DOT)
        b_solved = tl.dot(b_inverse, b_v, input_precision="ieee")
        store_rows(p_error, b_solved, b_rows, b_is_token, D_V, b_channels)
    for i in range(0, D_K, BK):
        b_channels = i + tl.arange(0, BK)
        b_k = load_rows(p_k, b_rows, b_is_token, D_K, b_channels)
        b_up, b_down, b_total = load_factors(
            p_decay, p_rest, b_t, num_tokens, H, D_K, b_channels, VECTOR
        )
        b_w = tl.dot(b_inverse, (b_k * b_up).to(DOT), input_precision="ieee")
        store_rows(p_w, b_w, b_rows, b_is_token, D_K, b_channels)
        store_rows(p_k_down, b_k * b_down, b_rows, b_is_token, D_K, b_channels)
        p_totals = p_total + (chunk * H + head) * D_K + b_channels
        tl.store(p_totals[None, :], b_total + tl.zeros((1, BK), tl.float32))


@triton.jit
def _invert(b_system, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """(I + strictly lower triangle)^-1, by elimination.

    Powers of the triangle would give it with few products, and lose every digit to equal keys.
    """
    b_t = tl.arange(0, C)
    b_inverse = tl.where(b_t[:, None] == b_t[None, :], 1.0, 0.0)
    for t in range(C - 1):
        b_row = tl.sum(tl.where((b_t == t)[:, None], b_inverse, 0.0), 0)
        b_column = tl.sum(tl.where((b_t == t)[None, :], b_system, 0.0), 1)
        b_inverse -= b_column[:, None] * b_row[None, :]
    return b_inverse


@triton.jit
def _delta_rule_states_fwd_kernel(  # type: ignore[no-untyped-def]
    p_w, p_error, p_k_down, p_total, p_beta, p_initial, p_chunks, p_documents,
    p_states, p_final, H,
    D_K: tl.constexpr, D_V: tl.constexpr, DOT: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid (documents * state heads, D_V / BV); p_error holds T v and then E."""
    document, head = tl.program_id(0) // H, tl.program_id(0) % H
    b_keys, b_t = tl.arange(0, D_K), tl.arange(0, C)
    b_channels = tl.program_id(1) * BV + tl.arange(0, BV)
    b_tile = b_keys[:, None] * D_V + b_channels[None, :]
    offset = tl.program_id(0).to(tl.int64) * D_K * D_V
    b_state = tl.zeros((D_K, BV), tl.float32)
    if p_initial is not None:
        b_state += tl.load(p_initial + offset + b_tile)
    for chunk in range(tl.load(p_documents + document), tl.load(p_documents + document + 1)):
        start, num_tokens = tl.load(p_chunks + 2 * chunk), tl.load(p_chunks + 2 * chunk + 1)
        b_rows, b_is_token = b_t * H, b_t < num_tokens
        row = start.to(tl.int64) * H + head
        index = tl.cast(chunk, tl.int64) * H + head
        tl.store(p_states + index * D_K * D_V + b_tile, b_state)
        b_error = load_rows(p_error + row * D_V, b_rows, b_is_token, D_V, b_channels)
        b_error -= apply_to_state(
            p_w + row * D_K, p_states + index * D_K * D_V, b_state, b_rows, b_is_token, b_channels,
            D_K, D_V, DOT, BK,
        )  # fmt: skip
        store_rows(p_error + row * D_V, b_error, b_rows, b_is_token, D_V, b_channels)
        b_beta = tl.load(p_beta + row + b_rows, mask=b_is_token, other=0.0).to(tl.float32)
        b_k_down = load_rows(p_k_down + row * D_K, b_rows, b_is_token, D_K, b_keys).to(DOT)
        b_u = (b_error * b_beta[:, None]).to(DOT)
        b_state *= tl.load(p_total + index * D_K + b_keys)[:, None]
        b_state += tl.dot(tl.trans(b_k_down), b_u, input_precision="ieee")
    tl.store(p_final + offset + b_tile, b_state)


@triton.jit
def apply_to_state(  # type: ignore[no-untyped-def]
    p_x, p_state, b_state, b_rows, b_is_token, b_channels,
    D_K: tl.constexpr, D_V: tl.constexpr, DOT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Multiply rows of p_x by the state, which p_state holds as well.

    Products of float32 keep whole rows of both operands in registers: they read it back by blocks.
    """
    if BK == D_K:
        b_x = load_rows(p_x, b_rows, b_is_token, D_K, tl.arange(0, D_K)).to(DOT)
        b_product = tl.dot(b_x, b_state.to(DOT), input_precision="ieee")
    else:
        tl.debug_barrier()
        b_product = tl.zeros((b_rows.shape[0], b_channels.shape[0]), tl.float32)
        for i in range(0, D_K, BK):
            b_keys = i + tl.arange(0, BK)
            b_x = load_rows(p_x, b_rows, b_is_token, D_K, b_keys).to(DOT)
            b_block = tl.load(p_state + b_keys[:, None] * D_V + b_channels[None, :]).to(DOT)
            b_product += tl.dot(b_x, b_block, input_precision="ieee")
    return b_product


@triton.jit
def _delta_rule_out_fwd_kernel(  # type: ignore[no-untyped-def]
    p_q, p_beta, p_decay, p_rest, p_error, p_states, p_reads, p_chunks, p_out, scale, H, group,
    D_K: tl.constexpr, D_V: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, query heads, D_V / BV); p_reads holds P."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, num_tokens = tl.load(p_chunks + 2 * chunk), tl.load(p_chunks + 2 * chunk + 1)
    b_t = tl.arange(0, C)
    b_rows, b_is_token = b_t * H, b_t < num_tokens
    row, q_row = start.to(tl.int64) * H + head // group, start.to(tl.int64) * H * group + head
    p_q, p_out = p_q + q_row * D_K, p_out + q_row * D_V
    p_decay += row * (D_K if VECTOR else 1)
    if p_rest is not None:
        p_rest += row * D_K
    b_channels = tl.program_id(2) * BV + tl.arange(0, BV)
    p_state = p_states + (chunk * H + head // group) * D_K * D_V

    b_out = tl.zeros((C, BV), tl.float32)
    for i in range(0, D_K, BK):
        b_keys = i + tl.arange(0, BK)
        b_up, _, _ = load_factors(p_decay, p_rest, b_t, num_tokens, H, D_K, b_keys, VECTOR)
        b_q = load_rows(p_q, b_rows * group, b_is_token, D_K, b_keys) * b_up
        b_state = tl.load(p_state + b_keys[:, None] * D_V + b_channels[None, :]).to(DOT)
        b_out += tl.dot(b_q.to(DOT), b_state, input_precision="ieee")
    b_out *= scale
    b_beta = tl.load(p_beta + row + b_rows, mask=b_is_token, other=0.0).to(tl.float32)
    b_u = load_rows(p_error + row * D_V, b_rows, b_is_token, D_V, b_channels) * b_beta[:, None]
    p_read = p_reads + (chunk * H * group + head) * C * C
    b_reads = tl.load(p_read + b_t[:, None] * C + b_t[None, :]).to(tl.float32).to(DOT)
    b_out += tl.dot(b_reads, b_u.to(DOT), input_precision="ieee")
    store_rows(p_out, b_out, b_rows * group, b_is_token, D_V, b_channels)
