"""Chunked linear attention in portable PyTorch (the chunk form of arXiv:2312.06635).

Every document is cut into chunks of C tokens (the last one padded with keys of zero and no decay,
which changes no state). With b_t the decay summed from the start of the chunk up to t,

    A[i, j] = sum_d q[i, d] k[j, d] exp(b[i, d] - b[j, d])   for j <= i
    out     = A v + (q exp(b)) S_in          S_out = exp(b_C) S_in + (k exp(b_C - b))^T v

Everything but the scan of S over the chunks is batched over all chunks.
"""

import torch
import torch.nn.functional as F

CHUNK_SIZE = 64
SUB_CHUNK_SIZE = 16
FACTOR_RANGE = 40.0
"""Decay inside a chunk (natural log) up to which exp(b_i - b_j) is computed as two factors."""
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
    n, _, G, C, _ = q.shape
    if log_decay is None:
        scores = (q @ k.unsqueeze(2).transpose(-1, -2)).tril()
        q_in, k_out, chunk_decay = q, k, None
    else:
        decay = log_decay.to(acc).clamp(min=MIN_LOG_DECAY).reshape(B * T, H_state, -1)
        decay = _to_chunks(decay, grid).double()  # [n, H_state, C, D_k or 1]
        cumulative = decay.cumsum(2)
        scores = _decayed_scores(q, k, cumulative, acc)
        q_in = (q * cumulative.exp().to(acc).unsqueeze(2)).to(v.dtype)
        total = cumulative[:, :, -1:]
        k_out = (k * (total - cumulative).exp().to(acc)).to(v.dtype)
        chunk_decay = total.squeeze(2).exp().to(acc)  # [n, H_state, D_k or 1]
    local = (k_out.transpose(-1, -2) @ v).to(acc)  # [n, H_state, D_k, D_v]
    chunks_per_document = [-(-length // CHUNK_SIZE) for length in lengths]
    states, final = _StateScan.apply(chunk_decay, local, initial_state, chunks_per_document)

    q_in = q_in.reshape(n, H_state, G * C, D_k)
    out = scores.view(n, H_state, G * C, C).to(v.dtype) @ v + q_in @ states.to(v.dtype)
    out = out.view(n, H_state, G, C, D_v).permute(0, 3, 1, 2, 4).reshape(n * C, H, D_v)
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


def _decayed_scores(
    q: torch.Tensor, k: torch.Tensor, cumulative: torch.Tensor, acc: torch.dtype
) -> torch.Tensor:
    """Return the lower triangle A of the module docstring, [n, H_state, G, C, C].

    Args:
        q: [n, H_state, G, C, D]; k: [n, H_state, C, D].
        cumulative: float64 [n, H_state, C, D or 1], decay summed from the start of the chunk.
    """
    spread = float((cumulative[:, :, 0] - cumulative[:, :, -1]).detach().max())
    if spread <= FACTOR_RANGE:
        # Both factors stay within exp(+-FACTOR_RANGE / 2), so neither loses precision.
        middle = (cumulative[:, :, :1] + cumulative[:, :, -1:]).detach() / 2
        q = (q * (cumulative - middle).exp().to(acc).unsqueeze(2)).to(k.dtype)
        k = (k * (middle - cumulative).exp().to(acc)).to(k.dtype)
        return (q @ k.unsqueeze(2).transpose(-1, -2)).tril()

    # Sub-chunks with their own reference point: no exponent is positive, whatever the decay.
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
    """S entering each chunk, from each chunk's own contribution and decay, by document."""

    @staticmethod
    def forward(ctx, decay, local, initial_state, chunks_per_document):  # type: ignore[no-untyped-def]
        states = torch.empty_like(local)
        finals = []
        chunk = 0
        for document, count in enumerate(chunks_per_document):
            state = torch.zeros_like(local[0]) if initial_state is None else initial_state[document]
            state = state.to(local.dtype)
            for c in range(chunk, chunk + count):
                states[c] = state
                state = local[c] + (state if decay is None else decay[c].unsqueeze(-1) * state)
            chunk += count
            finals.append(state)
        ctx.save_for_backward(decay, states)
        ctx.chunks_per_document = chunks_per_document
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return states, torch.stack(finals)

    @staticmethod
    def backward(ctx, dstates, dfinals):  # type: ignore[no-untyped-def]
        decay, states = ctx.saved_tensors
        dlocal = torch.empty_like(dstates)
        dinitials = []
        chunk = 0
        for document, count in enumerate(ctx.chunks_per_document):
            dstate = dfinals[document]
            for c in reversed(range(chunk, chunk + count)):
                dlocal[c] = dstate
                dstate = dstates[c] + (dstate if decay is None else decay[c].unsqueeze(-1) * dstate)
            chunk += count
            dinitials.append(dstate)
        ddecay = None
        if decay is not None:
            ddecay = (dlocal * states).sum(-1)
            if decay.shape[-1] == 1:
                ddecay = ddecay.sum(-1, keepdim=True)
        dinitial = None
        if ctx.initial_dtype is not None:
            dinitial = torch.stack(dinitials).to(ctx.initial_dtype)
        return ddecay, dlocal, dinitial, None
