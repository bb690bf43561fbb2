"""Chunked linear attention in portable PyTorch (the chunk form of arXiv:2312.06635).

Every document is cut into chunks of C tokens, the last one padded with keys of zero and no decay,
which changes no state. Everything but the scan of the state over the chunks is batched over all
chunks. Ordinary decays take `chunk.py`, strong ones with smaller chunks; where even those decay by
more than exp(FACTOR_RANGE), the sub-chunks below keep every exponent at or below zero.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ops.linear_attention.chunk import (
    FACTOR_RANGE,
    Chunks,
    chunk_linear_attention,
    scan_states,
    scan_states_backward,
)

CHUNK_SIZE = 64
"""Tokens of a chunk; half or a quarter where a channel decays too much inside it."""
SUB_CHUNK_SIZE = 16
MIN_LOG_DECAY = -1e4


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
    B, T, H, D_k = q.shape
    H_state, D_v = v.shape[2:]
    acc = torch.promote_types(q.dtype, torch.float32)
    lengths = [T] * B if cu_seqlens is None else cu_seqlens.diff().tolist()
    if log_decay is not None:
        log_decay = log_decay.to(acc).clamp(min=MIN_LOG_DECAY).reshape(B * T, H_state, -1)
    # float16 has fewer exponent bits than the others.
    factor_range = FACTOR_RANGE / 4 if v.dtype == torch.float16 else FACTOR_RANGE
    chunk_size = _chunk_size(log_decay, lengths, factor_range)
    grid = _chunk_grid(lengths, chunk_size or CHUNK_SIZE, q.device)

    q = grid.cut(q.reshape(B * T, H_state, H // H_state * D_k))
    q = q.view(*q.shape[:3], -1, D_k).transpose(2, 3)  # [n, H_state, G, C, D_k]
    k = grid.cut(k.reshape(B * T, H_state, D_k))  # [n, H_state, C, D_k]
    v = grid.cut(v.reshape(B * T, H_state, D_v))
    chunks = Chunks(q, k, v, None if log_decay is None else grid.cut(log_decay))
    form = chunk_linear_attention if chunk_size else _sub_chunked
    out, final = form(chunks, initial_state, grid.chunks_per_document)
    out = out.permute(0, 3, 1, 2, 4).reshape(-1, H, D_v)
    if grid.slots is not None:
        out = out[grid.slots]
    return (out * scale).view(B, T, H, D_v).to(v.dtype), final


def _chunk_size(
    log_decay: torch.Tensor | None, lengths: list[int], factor_range: float
) -> int | None:
    """Return the largest chunk size inside which no channel decays by more, None if none is."""
    if log_decay is None:
        return CHUNK_SIZE
    for chunk_size in (CHUNK_SIZE, CHUNK_SIZE // 2, CHUNK_SIZE // 4):
        decay = _chunk_grid(lengths, chunk_size, log_decay.device).cut(log_decay.detach())
        if -float(decay[:, :, 1:].sum(2).min()) <= factor_range:
            return chunk_size
    return None


class _Grid(NamedTuple):
    """Where the tokens of packed documents stand when each document is cut into chunks."""

    chunk_size: int
    chunks_per_document: list[int]
    tokens: torch.Tensor | None
    """Token of each chunk slot, the number of tokens where there is none; None: the identity."""
    slots: torch.Tensor | None
    """Slot of each token; None: the identity."""

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, H, D] -> [n, H, C, D], zeros in slots without a token."""
        if self.tokens is not None:
            x = F.pad(x, (0, 0, 0, 0, 0, 1))[self.tokens]
        return x.view(-1, self.chunk_size, *x.shape[1:]).transpose(1, 2)


def _chunk_grid(lengths: list[int], chunk_size: int, device: torch.device) -> _Grid:
    counts = [-(-length // chunk_size) for length in lengths]
    if all(length % chunk_size == 0 for length in lengths):
        return _Grid(chunk_size, counts, None, None)
    tokens, slots, position, slot = [], [], 0, 0
    for length in lengths:
        pad = -length % chunk_size
        tokens += [torch.arange(position, position + length), torch.full((pad,), sum(lengths))]
        slots.append(torch.arange(slot, slot + length))
        position, slot = position + length, slot + length + pad
    return _Grid(chunk_size, counts, torch.cat(tokens).to(device), torch.cat(slots).to(device))


def _sub_chunked(
    chunks: Chunks, initial_state: torch.Tensor | None, chunks_per_document: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunk form for any decay, differentiated by autograd."""
    q, k, v, log_decay = chunks
    assert log_decay is not None, "without decay there is nothing to split for"
    n, H, G, C, D_k = q.shape
    acc = log_decay.dtype
    cumulative = log_decay.double().cumsum(2)
    total = cumulative[:, :, -1:]
    k_out = (k * (total - cumulative).exp().to(acc)).to(v.dtype)
    local = (k_out.transpose(-1, -2) @ v).to(acc)
    decay = total.squeeze(2).exp().to(acc)
    states, final = _StateScan.apply(decay, local, initial_state, chunks_per_document)
    q_in = (q * cumulative.exp().to(acc).unsqueeze(2)).to(v.dtype).reshape(n, H, G * C, D_k)
    scores = _decayed_scores(q, k, cumulative, acc).view(n, H, G * C, C).to(v.dtype)
    out = scores @ v + q_in @ states.to(v.dtype)
    return out.view(n, H, G, C, v.shape[-1]), final


def _decayed_scores(
    q: torch.Tensor, k: torch.Tensor, cumulative: torch.Tensor, acc: torch.dtype
) -> torch.Tensor:
    """Return the lower triangle A of the module docstring, [n, H_state, G, C, C].

    Sub-chunks have their own reference point, so that no exponent is positive.

    Args:
        q: [n, H_state, G, C, D]; k: [n, H_state, C, D].
        cumulative: float64 [n, H_state, C, D or 1], decay summed from the start of the chunk.
    """
    c, C = SUB_CHUNK_SIZE, q.shape[-2]
    causal = torch.ones(c, c, dtype=torch.bool, device=q.device).tril()
    rows = []
    for start in range(0, C, c):
        here = slice(start, start + c)
        b, q_here = cumulative[:, :, here], q[..., here, :].to(acc)
        difference = (b.unsqueeze(3) - b.unsqueeze(2)).masked_fill(~causal[..., None], -torch.inf)
        weighted = k[:, :, None, here].to(acc) * difference.exp().to(acc)  # [n, H_state, c, c, D]
        parts = [torch.einsum("nhgid,nhijd->nhgij", q_here, weighted)]
        if start:
            reference = cumulative[:, :, start - 1 : start]
            left = q_here * (b - reference).exp().to(acc).unsqueeze(2)
            right = k[:, :, :start] * (reference - cumulative[:, :, :start]).exp().to(acc)
            parts.insert(0, left @ right.unsqueeze(2).transpose(-1, -2))
        rows.append(F.pad(torch.cat(parts, -1), (0, C - start - c)))
    return torch.cat(rows, -2)


class _StateScan(torch.autograd.Function):
    """`scan_states`, differentiable."""

    @staticmethod
    def forward(ctx, decay, local, initial_state, chunks_per_document):  # type: ignore[no-untyped-def]
        states, finals = scan_states(decay, local, initial_state, chunks_per_document)
        ctx.save_for_backward(decay, states)
        ctx.chunks_per_document = chunks_per_document
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return states, finals

    @staticmethod
    def backward(ctx, dstates, dfinals):  # type: ignore[no-untyped-def]
        decay, states = ctx.saved_tensors
        dlocal, dinitial = scan_states_backward(decay, dstates, dfinals, ctx.chunks_per_document)
        ddecay = (dlocal * states).sum(-1)
        if decay.shape[-1] == 1:
            ddecay = ddecay.sum(-1, keepdim=True)
        dinitial = None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype)
        return ddecay, dlocal, dinitial, None


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    state: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See `ops.linear_attention.linear_attention_step`."""
    if log_decay is not None:
        decay = log_decay.float().exp()
        state.mul_(decay[..., None] if decay.dim() == 3 else decay[..., None, None])
    state.add_(k.float()[..., None] * v.float()[..., None, :])
    B, H, D_k = q.shape
    grouped = q.float().view(B, k.shape[1], H // k.shape[1], D_k)
    return (grouped @ state * scale).view(B, H, v.shape[-1]).to(q.dtype)
