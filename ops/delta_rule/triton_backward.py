"""Backward kernels of the delta rule, in the notation of `torch_impl.py`.

Values: the errors E and what the queries alone do to U and to the states. States: the scan from
the last chunk to the first. Solve: the gradients of v, of beta and of the scores A and P. Inputs:
those of q, k and the decay through the states, beside `_delta_rule_scores_bwd_kernel`.
"""

import triton
import triton.language as tl

from ops.delta_rule.triton_forward import apply_to_state
from ops.delta_rule.triton_scores import load_factors, load_rows, store_rows


@triton.jit
def _delta_rule_values_bwd_kernel(  # type: ignore[no-untyped-def]
    p_q, p_decay, p_rest, p_w, p_error, p_states, p_reads, p_dout, p_chunks, p_du, p_dstates,
    scale, H, group,
    D_K: tl.constexpr, D_V: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, state heads, D_V / BV); p_error holds T v and then E."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, num_tokens = tl.load(p_chunks + 2 * chunk), tl.load(p_chunks + 2 * chunk + 1)
    b_t = tl.arange(0, C)
    b_rows, b_is_token = b_t * H, b_t < num_tokens
    row = start.to(tl.int64) * H + head
    p_q, p_dout = p_q + row * group * D_K, p_dout + row * group * D_V
    p_w, p_error, p_du = p_w + row * D_K, p_error + row * D_V, p_du + row * D_V
    p_decay += row * (D_K if VECTOR else 1)
    if p_rest is not None:
        p_rest += row * D_K
    b_channels = tl.program_id(2) * BV + tl.arange(0, BV)
    square = (chunk * H + head) * D_K * D_V

    b_error = load_rows(p_error, b_rows, b_is_token, D_V, b_channels)
    for i in range(0, D_K, BK):
        b_keys = i + tl.arange(0, BK)
        b_tile = square + b_keys[:, None] * D_V + b_channels[None, :]
        b_w = load_rows(p_w, b_rows, b_is_token, D_K, b_keys).to(DOT)
        b_error -= tl.dot(b_w, tl.load(p_states + b_tile).to(DOT), input_precision="ieee")
        b_up, _, _ = load_factors(p_decay, p_rest, b_t, num_tokens, H, D_K, b_keys, VECTOR)
        b_up *= scale
        b_dstate = tl.zeros((BK, BV), tl.float32)
        for reader in range(group):
            b_q_rows = b_rows * group + reader
            b_q_up = (load_rows(p_q, b_q_rows, b_is_token, D_K, b_keys) * b_up).to(DOT)
            b_dout = load_rows(p_dout, b_q_rows, b_is_token, D_V, b_channels).to(DOT)
            b_dstate += tl.dot(tl.trans(b_q_up), b_dout, input_precision="ieee")
        tl.store(p_dstates + b_tile, b_dstate)
    store_rows(p_error, b_error, b_rows, b_is_token, D_V, b_channels)

    b_du = tl.zeros((C, BV), tl.float32)
    for reader in range(group):
        p_read = p_reads + ((chunk * H + head) * group + reader) * C * C
        b_reads = tl.load(p_read + b_t[:, None] * C + b_t[None, :]).to(tl.float32).to(DOT)
        b_dout = load_rows(p_dout, b_rows * group + reader, b_is_token, D_V, b_channels)
        b_du += tl.dot(tl.trans(b_reads), b_dout.to(DOT), input_precision="ieee")
    store_rows(p_du, b_du, b_rows, b_is_token, D_V, b_channels)


@triton.jit
def _delta_rule_states_bwd_kernel(  # type: ignore[no-untyped-def]
    p_w, p_k_down, p_total, p_beta, p_dfinal, p_chunks, p_documents, p_du, p_dstates, p_dinitial, H,
    D_K: tl.constexpr, D_V: tl.constexpr, DOT: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid (documents * state heads, D_V / BV).

    p_du and p_dstates hold what the queries of a chunk give and then the gradients of its U and of
    the state that leaves it.
    """
    document, head = tl.program_id(0) // H, tl.program_id(0) % H
    b_keys, b_t = tl.arange(0, D_K), tl.arange(0, C)
    b_channels = tl.program_id(1) * BV + tl.arange(0, BV)
    b_tile = b_keys[:, None] * D_V + b_channels[None, :]
    offset = tl.program_id(0).to(tl.int64) * D_K * D_V
    b_dstate = tl.load(p_dfinal + offset + b_tile)
    first, last = tl.load(p_documents + document), tl.load(p_documents + document + 1)
    for i in range(first, last):
        chunk = last - 1 - (i - first)
        start, num_tokens = tl.load(p_chunks + 2 * chunk), tl.load(p_chunks + 2 * chunk + 1)
        b_rows, b_is_token = b_t * H, b_t < num_tokens
        row = start.to(tl.int64) * H + head
        index = tl.cast(chunk, tl.int64) * H + head
        p_tile = p_dstates + index * D_K * D_V + b_tile
        b_local = tl.load(p_tile)
        tl.store(p_tile, b_dstate)
        b_du = load_rows(p_du + row * D_V, b_rows, b_is_token, D_V, b_channels)
        b_du += apply_to_state(
            p_k_down + row * D_K, p_dstates + index * D_K * D_V, b_dstate, b_rows, b_is_token,
            b_channels, D_K, D_V, DOT, BK,
        )  # fmt: skip
        store_rows(p_du + row * D_V, b_du, b_rows, b_is_token, D_V, b_channels)
        b_beta = tl.load(p_beta + row + b_rows, mask=b_is_token, other=0.0).to(tl.float32)
        b_w = load_rows(p_w + row * D_K, b_rows, b_is_token, D_K, b_keys).to(DOT)
        b_derror = (b_du * b_beta[:, None]).to(DOT)
        b_dstate *= tl.load(p_total + index * D_K + b_keys)[:, None]
        b_dstate += b_local
        b_dstate -= tl.dot(tl.trans(b_w), b_derror, input_precision="ieee")
    tl.store(p_dinitial + offset + b_tile, b_dstate)


@triton.jit
def _delta_rule_solve_bwd_kernel(  # type: ignore[no-untyped-def]
    p_beta, p_error, p_du, p_dout, p_inverse, p_scores, p_chunks, p_dv, p_dbeta, p_dscores,
    p_dreads, H, group,
    D_V: tl.constexpr, DOT: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, state heads)."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, num_tokens = tl.load(p_chunks + 2 * chunk), tl.load(p_chunks + 2 * chunk + 1)
    b_t = tl.arange(0, C)
    b_rows, b_is_token = b_t * H, b_t < num_tokens
    row = start.to(tl.int64) * H + head
    p_error, p_du, p_dv = p_error + row * D_V, p_du + row * D_V, p_dv + row * D_V
    p_dout, p_beta, p_dbeta = p_dout + row * group * D_V, p_beta + row, p_dbeta + row
    b_beta = tl.load(p_beta + b_rows, mask=b_is_token, other=0.0).to(tl.float32)
    b_tile = b_t[:, None] * C + b_t[None, :]
    square = (chunk * H + head) * C * C

    b_inverse = tl.load(p_inverse + square + b_tile).to(tl.float32).to(DOT)
    b_scores = tl.load(p_scores + square + b_tile).to(tl.float32)
    b_scores = tl.where(b_t[:, None] > b_t[None, :], b_scores, 0.0).to(DOT)
    b_dscores, b_dbeta = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32)
    for i in range(0, D_V, BV):
        b_channels = i + tl.arange(0, BV)
        b_du = load_rows(p_du, b_rows, b_is_token, D_V, b_channels)
        b_error = load_rows(p_error, b_rows, b_is_token, D_V, b_channels)
        b_derror = (b_du * b_beta[:, None]).to(DOT)
        b_dv = tl.dot(tl.trans(b_inverse), b_derror, input_precision="ieee")
        store_rows(p_dv, b_dv, b_rows, b_is_token, D_V, b_channels)
        b_u = (b_error * b_beta[:, None]).to(DOT)
        b_dscores -= tl.dot(b_dv.to(DOT), tl.trans(b_u), input_precision="ieee")
        b_du -= tl.dot(tl.trans(b_scores), b_dv.to(DOT), input_precision="ieee")
        b_dbeta += tl.sum(b_error * b_du, 1)
    tl.store(p_dbeta + b_rows, b_dbeta, mask=b_is_token)
    b_dscores = tl.where(b_t[:, None] > b_t[None, :], b_dscores, 0.0)
    tl.store(p_dscores + square + b_tile, b_dscores.to(p_dscores.dtype.element_ty))
    for reader in range(group):
        b_dreads = tl.zeros((C, C), tl.float32)
        for i in range(0, D_V, BV):
            b_channels = i + tl.arange(0, BV)
            b_error = load_rows(p_error, b_rows, b_is_token, D_V, b_channels)
            b_u = (b_error * b_beta[:, None]).to(DOT)
            b_dout = load_rows(p_dout, b_rows * group + reader, b_is_token, D_V, b_channels)
            b_dreads += tl.dot(b_dout.to(DOT), tl.trans(b_u), input_precision="ieee")
        b_dreads = tl.where(b_t[:, None] >= b_t[None, :], b_dreads, 0.0)
        p_tile = p_dreads + ((chunk * H + head) * group + reader) * C * C + b_tile
        tl.store(p_tile, b_dreads.to(p_dreads.dtype.element_ty))


@triton.jit
def _delta_rule_inputs_bwd_kernel(  # type: ignore[no-untyped-def]
    p_q, p_k, p_beta, p_decay, p_rest, p_error, p_states, p_dout, p_dv, p_dstates, p_dq_scores,
    p_dk_scores, p_dsums, p_chunks, p_dq, p_dk, p_ddecay, p_dnext, scale, H, group, num_rows,
    D_K: tl.constexpr, D_V: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, state heads, D_K / BK).

    The gradient of a decay is what p_ddecay holds for its token and p_dnext for the one before;
    one decay for all channels has num_rows values of both for each block of channels.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, num_tokens = tl.load(p_chunks + 2 * chunk), tl.load(p_chunks + 2 * chunk + 1)
    b_t = tl.arange(0, C)
    b_rows, b_is_token = b_t * H, b_t < num_tokens
    row = start.to(tl.int64) * H + head
    b_keys = tl.program_id(2) * BK + tl.arange(0, BK)
    part = row * (D_K if VECTOR else 1)
    p_decay += part
    if p_rest is not None:
        p_rest += part
    if not VECTOR:
        part += tl.program_id(2).to(tl.int64) * num_rows
    p_square = (chunk * H + head) * D_K * D_V + b_keys[:, None] * D_V
    b_beta = tl.load(p_beta + row + b_rows, mask=b_is_token, other=0.0).to(tl.float32)

    b_dk_up, b_dk_down = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
    b_dtotal = tl.zeros((BK,), tl.float32)
    for i in range(0, D_V, BV):
        b_channels = i + tl.arange(0, BV)
        b_state = tl.load(p_states + p_square + b_channels[None, :])
        b_dstate = tl.load(p_dstates + p_square + b_channels[None, :])
        b_dtotal += tl.sum(b_state * b_dstate, 1)
        b_dv = load_rows(p_dv + row * D_V, b_rows, b_is_token, D_V, b_channels).to(DOT)
        b_dk_up -= tl.dot(b_dv, tl.trans(b_state.to(DOT)), input_precision="ieee")
        b_u = load_rows(p_error + row * D_V, b_rows, b_is_token, D_V, b_channels)
        b_u = (b_u * b_beta[:, None]).to(DOT)
        b_dk_down += tl.dot(b_u, tl.trans(b_dstate.to(DOT)), input_precision="ieee")
    b_up, b_down, b_total = load_factors(p_decay, p_rest, b_t, num_tokens, H, D_K, b_keys, VECTOR)
    b_k = load_rows(p_k + row * D_K, b_rows, b_is_token, D_K, b_keys)
    b_dk_up *= b_up
    b_dk_down *= b_down
    b_dk = load_rows(p_dk_scores + row * D_K, b_rows, b_is_token, D_K, b_keys)
    b_dk += b_dk_up + b_dk_down
    store_rows(p_dk + row * D_K, b_dk, b_rows, b_is_token, D_K, b_keys)
    b_dup = b_k * b_dk_up
    # The last token of a chunk has no next one there.
    b_is_inner = (b_t + 1 < num_tokens)[:, None]
    b_dnext = tl.where(b_is_inner, tl.cumsum(b_k * b_dk_down, 0), 0.0)
    b_dtotal = b_dtotal[None, :] * b_total

    for reader in range(group):
        q_row, b_q_rows = row * group + reader, b_rows * group
        b_dq = tl.zeros((C, BK), tl.float32)
        for i in range(0, D_V, BV):
            b_channels = i + tl.arange(0, BV)
            b_state = tl.load(p_states + p_square + b_channels[None, :]).to(DOT)
            b_dout = load_rows(p_dout + q_row * D_V, b_q_rows, b_is_token, D_V, b_channels)
            b_dq += tl.dot(b_dout.to(DOT), tl.trans(b_state), input_precision="ieee")
        b_dq *= b_up * scale
        b_dup += b_dq * load_rows(p_q + q_row * D_K, b_q_rows, b_is_token, D_K, b_keys)
        b_dq += load_rows(p_dq_scores + q_row * D_K, b_q_rows, b_is_token, D_K, b_keys)
        store_rows(p_dq + q_row * D_K, b_dq, b_q_rows, b_is_token, D_K, b_keys)

    if VECTOR:
        b_dup += load_rows(p_dsums + part, b_rows, b_is_token, D_K, b_keys)
        b_ddecay = tl.cumsum(b_dup, 0, reverse=True) + b_dtotal
        store_rows(p_ddecay + part, b_ddecay, b_rows, b_is_token, D_K, b_keys)
        store_rows(p_dnext + part, b_dnext, b_rows, b_is_token, D_K, b_keys)
    else:
        b_dup = tl.sum(b_dup, 1) + tl.load(p_dsums + part + b_rows, mask=b_is_token, other=0.0)
        b_ddecay = tl.cumsum(b_dup, 0, reverse=True) + tl.sum(b_dtotal)
        tl.store(p_ddecay + part + b_rows, b_ddecay, mask=b_is_token)
        tl.store(p_dnext + part + b_rows, tl.sum(b_dnext, 1), mask=b_is_token)
