"""Chunked linear attention in portable PyTorch (the chunk form of arXiv:2312.06635).

Every document is cut into chunks of C tokens, the last one padded with keys of zero and no decay,
which changes no state. Everything but the scan of the state over the chunks is batched over all
chunks. Ordinary decays take `chunk.py`; where a chunk decays by more than exp(FACTOR_RANGE), the
sub-chunks below keep every exponent at or below zero.
"""

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
    grid = _chunk_grid(lengths, q.device)

    q = _to_chunks(q.reshape(B * T, H_state, H // H_state * D_k), grid)
    q = q.view(*q.shape[:3], -1, D_k).transpose(2, 3)  # [n, H_state, G, C, D_k]
    k = _to_chunks(k.reshape(B * T, H_state, D_k), grid)  # [n, H_state, C, D_k]
    v = _to_chunks(v.reshape(B * T, H_state, D_v), grid)
    chunks_per_document = [-(-length // CHUNK_SIZE) for length in lengths]
    if log_decay is not None:
        log_decay = log_decay.to(acc).clamp(min=MIN_LOG_DECAY).reshape(B * T, H_state, -1)
        log_decay = _to_chunks(log_decay, grid)
    chunks = Chunks(q, k, v, log_decay)
    # float16 has fewer exponent bits than the others.
    factor_range = FACTOR_RANGE / 4 if v.dtype == torch.float16 else FACTOR_RANGE
    if log_decay is None or _range(log_decay) <= factor_range:
        out, final = chunk_linear_attention(chunks, initial_state, chunks_per_document)
    else:
        out, final = _sub_chunked(chunks, initial_state, chunks_per_document)
    out = out.permute(0, 3, 1, 2, 4).reshape(-1, H, D_v)
    if grid is not None:
        out = out[grid[1]]
    return (out * scale).view(B, T, H, D_v).to(v.dtype), final


def _chunk_grid(
    lengths: list[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (token of each chunk slot, slot of each token); None if the grid is the identity.

    Slots without a token name token number `sum(lengths)`, a row of zeros.
    """
    C = CHUNK_SIZE
    if all(length % C == 0 for length in lengths):
        return None
    tokens, slots, position, slot = [], [], 0, 0
    for length in lengths:
        pad = -length % C
        tokens += [torch.arange(position, position + length), torch.full((pad,), sum(lengths))]
        slots.append(torch.arange(slot, slot + length))
        position, slot = position + length, slot + length + pad
    return torch.cat(tokens).to(device), torch.cat(slots).to(device)


def _to_chunks(x: torch.Tensor, grid: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """[tokens, H, D] -> [n, H, C, D]."""
    if grid is not None:
        x = F.pad(x, (0, 0, 0, 0, 0, 1))[grid[0]]
    return x.view(-1, CHUNK_SIZE, *x.shape[1:]).transpose(1, 2)


def _range(log_decay: torch.Tensor) -> float:
    """Return the largest sum of decays between the first and last token of a chunk."""
    return -float(log_decay.detach()[:, :, 1:].sum(2).min())


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
