"""The chunk form with its own backward pass, for decays that two factors can carry.

With b_t the decay summed inside the chunk, m the middle of its range and S the state that enters,

    q' = q exp(b - m)    k' = k exp(m - b)    out = tril(q' k'^T) v + q' (exp(m) S)
    S_next = exp(b_C) S + exp(b_C - m) (k'^T v)

No exponent exceeds half the range of b, so with a range of `FACTOR_RANGE` nothing is lost. The
gradient of the decay is the reversed sum of q dq - k dk inside the chunk plus what the chunk's end
state carries (section 3 of arXiv:2312.06635).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

FACTOR_RANGE = 40.0


class Chunks(NamedTuple):
    """Inputs cut into n chunks of C tokens, and how many of them each document has."""

    q: torch.Tensor
    """[n, H_state, G, C, D_k]; G query heads share a state."""
    k: torch.Tensor
    """[n, H_state, C, D_k]."""
    v: torch.Tensor
    """[n, H_state, C, D_v]."""
    log_decay: torch.Tensor | None
    """[n, H_state, C, D_k or 1], float32 or float64."""


def chunk_linear_attention(
    chunks: Chunks, initial_state: torch.Tensor | None, chunks_per_document: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [n, H_state, G, C, D_v], unscaled, and the final state of each document."""
    out, final = _Chunk.apply(*chunks, initial_state, chunks_per_document)
    return out, final


def scan_states(
    decay: torch.Tensor | None,
    local: torch.Tensor,
    initial_state: torch.Tensor | None,
    chunks_per_document: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run S <- decay S + local over the chunks, document by document.

    Args:
        decay: [n, H_state, D_k or 1] or None for 1.
        local: [n, H_state, D_k, D_v], what each chunk adds.

    Returns:
        The state that enters each chunk, as `local`, and the last of each document.
    """
    states, finals, chunk = torch.empty_like(local), [], 0
    for document, count in enumerate(chunks_per_document):
        state = torch.zeros_like(local[0]) if initial_state is None else initial_state[document]
        state = state.to(local.dtype)
        for c in range(chunk, chunk + count):
            states[c] = state
            state = _advance(state, local, decay, c)
        chunk += count
        finals.append(state)
    return states, torch.stack(finals)


def scan_states_backward(
    decay: torch.Tensor | None,
    dstates: torch.Tensor,
    dfinals: torch.Tensor,
    chunks_per_document: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `local` (that of the state leaving each chunk) and initial states."""
    dlocal, dinitials, chunk = torch.empty_like(dstates), [], 0
    for document, count in enumerate(chunks_per_document):
        dstate = dfinals[document]
        for c in reversed(range(chunk, chunk + count)):
            dlocal[c] = dstate
            dstate = _advance(dstate, dstates, decay, c)
        chunk += count
        dinitials.append(dstate)
    return dlocal, torch.stack(dinitials)


def _advance(
    state: torch.Tensor, added: torch.Tensor, decay: torch.Tensor | None, chunk: int
) -> torch.Tensor:
    if decay is None:
        return added[chunk] + state
    return torch.addcmul(added[chunk], decay[chunk].unsqueeze(-1), state)


class _Factors(NamedTuple):
    """Exponentials of the decay; all None without decay."""

    up: torch.Tensor
    """exp(b - m) [n, H_state, C, D_k or 1]."""
    middle: torch.Tensor
    """exp(m) [n, H_state, D_k or 1, 1]."""
    rest: torch.Tensor
    """exp(b_C - m) [n, H_state, D_k or 1, 1]."""
    total: torch.Tensor
    """exp(b_C) [n, H_state, D_k or 1]."""


def _factors(log_decay: torch.Tensor) -> _Factors:
    # Relative to the first token, whose own decay may be too large to add the others to.
    first = log_decay[:, :, 0]
    b = F.pad(log_decay[:, :, 1:], (0, 0, 1, 0)).cumsum(2)
    total = b[:, :, -1]
    half = total / 2
    up = (b - half.unsqueeze(2)).exp_()
    rest = (total - half).exp_().unsqueeze(-1)
    return _Factors(up, (first + half).exp_().unsqueeze(-1), rest, (first + total).exp_())


class _Chunk(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, q, k, v, log_decay, initial_state, chunks_per_document
    ):
        n, H, G, C, D_k = q.shape
        factors = None if log_decay is None else _factors(log_decay)
        if factors is not None:
            q = (q * factors.up.unsqueeze(2)).to(v.dtype)
            k = (k / factors.up).to(v.dtype)
        q = q.reshape(n, H, G * C, D_k)
        local = (k.transpose(-1, -2) @ v).to(torch.promote_types(v.dtype, torch.float32))
        if factors is not None:
            local = local.mul_(factors.rest)
        decay = None if factors is None else factors.total
        states, final = scan_states(decay, local, initial_state, chunks_per_document)
        out = _scores(q, k, G) @ v
        out += q @ _entering(states, factors, v.dtype)
        ctx.save_for_backward(q, k, v, log_decay, states)
        ctx.chunks_per_document = chunks_per_document
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return out.view(n, H, G, C, v.shape[-1]), final

    @staticmethod
    def backward(ctx: Any, dout, dfinal):  # type: ignore[no-untyped-def]
        q, k, v, log_decay, states = ctx.saved_tensors
        n, H, G, C, D_v = dout.shape
        factors = None if log_decay is None else _factors(log_decay)
        dout = dout.reshape(n, H, G * C, D_v)
        entering = _entering(states, factors, v.dtype)

        dstates = (q.transpose(-1, -2) @ dout).to(states.dtype)
        if factors is not None:
            dstates = dstates.mul_(factors.middle)
        decay = None if factors is None else factors.total
        dleaving, dinitial = scan_states_backward(decay, dstates, dfinal, ctx.chunks_per_document)
        dlocal = (dleaving if factors is None else dleaving * factors.rest).to(v.dtype)

        dscores = _tril(dout @ v.transpose(-1, -2), G)
        # The gate's gradient is a difference of q dq and k dk in which the diagonal of the scores
        # cancels; it does so only if neither product is rounded to 16 bits.
        wide = v.dtype if factors is None else states.dtype
        dscores = dscores.to(wide)
        dq = dscores @ k.to(wide)
        dq += dout @ entering.transpose(-1, -2)
        dk_state = v @ dlocal.transpose(-1, -2)
        dk = dscores.transpose(-1, -2) @ q.to(wide) + dk_state
        dv = _scores(q, k, G).transpose(-1, -2) @ dout
        dv += k @ dlocal

        dlog_decay = None
        if factors is not None:
            db = (q * dq).view(n, H, G, C, -1).sum(2, dtype=wide) - k.to(wide) * dk
            end = (k.to(wide) * dk_state).sum(2)
            end += factors.total * (states * dleaving).sum(-1)
            dlog_decay = (db.sum(2) + end).unsqueeze(2) - db.cumsum(2) + db
            if log_decay.shape[-1] == 1:
                dlog_decay = dlog_decay.sum(-1, keepdim=True)
            dq = (dq.view(n, H, G, C, -1) * factors.up.unsqueeze(2)).to(v.dtype)
            dk = (dk / factors.up).to(v.dtype)
        dq = dq.view(n, H, G, C, -1)
        dinitial_state = dinitial.to(ctx.initial_dtype) if ctx.initial_dtype else None
        return dq, dk, dv, dlog_decay, dinitial_state, None


def _entering(states: torch.Tensor, factors: _Factors | None, dtype: torch.dtype) -> torch.Tensor:
    return (states if factors is None else states * factors.middle).to(dtype)


def _scores(q: torch.Tensor, k: torch.Tensor, G: int) -> torch.Tensor:
    """Causal q k^T of each chunk, [n, H_state, G C, C]."""
    return _tril(q @ k.transpose(-1, -2), G)


def _tril(x: torch.Tensor, G: int) -> torch.Tensor:
    n, H, rows, C = x.shape
    return x.view(n, H, G, C, C).tril_().view(n, H, rows, C)
