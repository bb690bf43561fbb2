"""Linear attention in Triton: chunks of tokens in both passes (section 4 of arXiv:2312.06635).

A scan writes the state that enters each chunk, another, in reverse, the gradient of the state that
leaves it; everything else runs in parallel over chunks. Only the inputs are kept for the backward
pass, which scans the states again.
"""

from typing import Any, NamedTuple

import torch
import triton

from ops.linear_attention.triton_backward import (
    _linear_attention_bwd_qk_kernel,
    _linear_attention_bwd_v_kernel,
)
from ops.linear_attention.triton_builds import CHUNK, SEARCH, list_builds, settings
from ops.linear_attention.triton_forward import (
    NONE,
    SCALAR,
    VECTOR,
    _linear_attention_fwd_kernel,
    _linear_attention_scan_kernel,
    _linear_attention_step_kernel,
)
from ops.triton_runtime import dot_dtype

__all__ = ["SEARCH", "linear_attention", "linear_attention_step", "list_builds"]


class Chunks(NamedTuple):
    """Where documents are cut; all of a call but its tensors."""

    spans: torch.Tensor
    """int32 [n, 2]: first token and the one behind the last of each chunk, in [B T] tokens."""
    offsets: torch.Tensor
    """int32 [N+1]: the first chunk of each document."""
    scale: float


class Gradients(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_decay: torch.Tensor | None
    initial_state: torch.Tensor


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    scale: float,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.linear_attention.linear_attention`."""
    B, T = q.shape[:2]
    ends = torch.arange(B + 1) * T if cu_seqlens is None else cu_seqlens.cpu()
    chunks = _cut(ends, float(scale), q.device)
    if log_decay is not None:
        log_decay = log_decay.float().contiguous()
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, final = _LinearAttention.apply(q, k, v, log_decay, initial_state, chunks)
    return out, final


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    state: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See `ops.linear_attention.linear_attention_step`."""
    B, H, D_k = q.shape
    H_state, D_v = v.shape[1:]
    q, k, v = (x.contiguous() for x in (q, k, v))
    log_decay = None if log_decay is None else log_decay.contiguous()
    kept = state.contiguous()
    out = q.new_empty(B, H, D_v)
    blocks = settings("step", D_k, D_v, q.device)
    grid = (B, H_state, triton.cdiv(D_v, blocks["BV"]))
    _linear_attention_step_kernel[grid](
        q, k, v, log_decay, kept, out, scale, H_state, H // H_state,
        D_k, D_v, _kind(log_decay, 2), **blocks,
    )  # fmt: skip
    if kept is not state:
        state.copy_(kept)
    return out


def linear_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    chunks: Chunks,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and the final states; inputs are contiguous, decay and states float32."""
    H, D_v = q.shape[2], v.shape[-1]
    states, final = _scan(k, v, log_decay, initial_state, chunks, v.shape[2])
    out = q.new_empty(*q.shape[:3], D_v)
    launch = _launch_settings("fwd", q, v, log_decay)
    _linear_attention_fwd_kernel[len(chunks.spans), H, triton.cdiv(D_v, launch["BV"])](
        q, k, v, log_decay, states, out, chunks.spans, chunks.scale, H, **CHUNK, **launch
    )
    return out, final


def linear_attention_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    chunks: Chunks,
    dout: torch.Tensor,
    dfinal: torch.Tensor | None,
) -> Gradients:
    """Return the gradients of the inputs of `linear_attention_fwd`, those of states float32."""
    H, H_state, D_k, D_v = *q.shape[2:3], *k.shape[2:], v.shape[-1]
    num_tokens, num_chunks = q.shape[0] * q.shape[1], len(chunks.spans)
    states, _ = _scan(k, v, log_decay, initial_state, chunks, H_state)
    dstates, dinitial = _scan(q, dout, log_decay, dfinal, chunks, H_state, reverse=True)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    launch = _launch_settings("bwd_v", q, v, log_decay)
    _linear_attention_bwd_v_kernel[num_chunks, H_state, triton.cdiv(D_v, launch["BV"])](
        q, k, log_decay, dout, dstates, dv, chunks.spans, chunks.scale, H, **CHUNK, **launch
    )
    launch = _launch_settings("bwd_qk", q, v, log_decay)
    blocks_k = triton.cdiv(D_k, launch["BK"])
    dlog_decay = None
    if log_decay is not None:
        is_scalar = log_decay.dim() == 3
        shape = (blocks_k, *log_decay.shape) if is_scalar else log_decay.shape
        dlog_decay = torch.empty(shape, dtype=torch.float32, device=q.device)
    _linear_attention_bwd_qk_kernel[num_chunks, H_state, blocks_k](
        q, k, v, log_decay, dout, states, dstates, dq, dk, dlog_decay, chunks.spans,
        chunks.scale, num_tokens, H, **CHUNK, **launch,
    )  # fmt: skip
    if dlog_decay is not None and is_scalar:
        dlog_decay = dlog_decay.sum(0)
    return Gradients(dq, dk, dv, dlog_decay, dinitial)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, log_decay, initial_state, chunks):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v, log_decay, initial_state)
        ctx.chunks = chunks
        ctx.set_materialize_grads(False)
        return linear_attention_fwd(q, k, v, log_decay, initial_state, chunks)

    @staticmethod
    def backward(ctx: Any, dout, dfinal):  # type: ignore[no-untyped-def]
        q, k, v, log_decay, initial_state = ctx.saved_tensors
        dout = q.new_zeros(*q.shape[:3], v.shape[-1]) if dout is None else dout.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        gradients = linear_attention_bwd(
            q, k, v, log_decay, initial_state, ctx.chunks, dout, dfinal
        )
        dinitial = None if initial_state is None else gradients.initial_state
        return *gradients[:4], dinitial, None


def _scan(
    x: torch.Tensor,
    y: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial: torch.Tensor | None,
    chunks: Chunks,
    H_state: int,
    *,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the state before each chunk (in reverse: behind it) and the last of each document."""
    num_documents, sizes = len(chunks.offsets) - 1, (H_state, x.shape[-1], y.shape[-1])
    # bfloat16 products would round the states anyway; float16 could not hold them.
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    states = torch.empty(len(chunks.spans), *sizes, dtype=dtype, device=x.device)
    final = torch.empty(num_documents, *sizes, dtype=torch.float32, device=x.device)
    launch = _launch_settings("scan", x, y, log_decay) | {"group": x.shape[2] // H_state}
    blocks = triton.cdiv(x.shape[-1], launch["BK"]) * triton.cdiv(y.shape[-1], launch["BV"])
    _linear_attention_scan_kernel[num_documents, H_state, blocks](
        x, y, log_decay, initial, states, final, chunks.spans, chunks.offsets,
        chunks.scale if reverse else 1.0, H_state, C=CHUNK["C"], REVERSE=reverse, **launch,
    )  # fmt: skip
    return states, final


def _launch_settings(
    kernel: str, q: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor | None
) -> dict[str, Any]:
    """Return what all kernels over chunks take besides tensors, chunks and H."""
    H, D_k = q.shape[2:]
    H_state, D_v = v.shape[2:]
    constants = {"D_K": D_k, "D_V": D_v, "DECAY": _kind(log_decay, 3), "DOT": dot_dtype(q)}
    blocks = settings(kernel, D_k, D_v, q.device, is_fp32=q.dtype == torch.float32)
    return {"group": H // H_state} | constants | blocks


def _kind(log_decay: torch.Tensor | None, scalar_dim: int) -> int:
    """Return the constant that tells kernels whether decay is absent, scalar or per channel."""
    decay = NONE if log_decay is None else SCALAR if log_decay.dim() == scalar_dim else VECTOR
    return int(decay.value)


def _cut(ends: torch.Tensor, scale: float, device: torch.device) -> Chunks:
    """Cut documents, [0, .., tokens], into chunks."""
    C = CHUNK["C"]
    counts = (ends.diff() + C - 1) // C
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    document = torch.repeat_interleave(torch.arange(len(counts)), counts)
    index = torch.arange(len(document)) - offsets[document]
    starts = ends[document] + index * C
    stops = torch.minimum(starts + C, ends[document + 1])
    spans = torch.stack([starts, stops], 1).to(torch.int32)
    return Chunks(spans.to(device), offsets.to(torch.int32).to(device), scale)
