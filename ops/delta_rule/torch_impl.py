"""The chunked delta rule in portable PyTorch (WY form of arXiv:2406.06484, section 3).

Per chunk of C tokens that the state S enters, with b the decay summed up to a token, r the decay
summed after it, A and P the causal scores of `scores.py` (A of the keys, strict; P of the queries)
and T = (I + A diag(beta))^-1:

    E = T v - W S                  W = T (k exp(b))            U = diag(beta) E
    out = (q exp(b)) S + P U       S_next = exp(b_C) S + (k exp(r))^T U = M S + local

E is the error of each token's prediction. Only the scan of S over the chunks is sequential: it
applies the dense M. The backward pass keeps the inputs and the states that enter the chunks.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ops.delta_rule.scores import (
    exclusive_sums,
    scalar_scores,
    scalar_scores_backward,
    sums_from,
    vector_scores,
    vector_scores_backward,
)

CHUNK_SIZE = 64


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor | None,
    scale: float,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.delta_rule.delta_rule`."""
    B, T, H, D_k = q.shape
    H_state, D_v = v.shape[2:]
    lengths = [T] * B if cu_seqlens is None else cu_seqlens.diff().tolist()
    slots = _slots(lengths, q.device)
    counts = [-(-length // CHUNK_SIZE) for length in lengths]
    if log_decay is None:
        log_decay = torch.zeros_like(beta, dtype=torch.float32)

    def cut(x: torch.Tensor) -> torch.Tensor:  # [B, T, ...] -> [n, H_state, C, D]
        x = x.reshape(B * T, H_state, -1)
        if slots is not None:  # a slot without a token has a key, a beta and a decay of zero
            x = x.new_zeros(sum(counts) * CHUNK_SIZE, *x.shape[1:]).index_copy(0, slots, x)
        return x.view(-1, CHUNK_SIZE, *x.shape[1:]).transpose(1, 2)

    q = cut(q).unflatten(-1, (H // H_state, D_k)).transpose(2, 3)  # [n, H_state, G, C, D_k]
    inputs = (q, cut(k), cut(v), cut(beta), cut(log_decay))
    out, final = _DeltaRule.apply(*inputs, initial_state, scale, counts)
    out = out.permute(0, 3, 1, 2, 4).reshape(-1, H, D_v)
    out = out if slots is None else out[slots]
    return out.view(B, T, H, D_v), final


def _slots(lengths: list[int], device: torch.device) -> torch.Tensor | None:
    """Return the slot of each token when documents are cut into chunks; None: the identity."""
    if all(length % CHUNK_SIZE == 0 for length in lengths):
        return None
    slots, start = [], 0
    for length in lengths:
        slots.append(torch.arange(start, start + length))
        start += length + -length % CHUNK_SIZE
    return torch.cat(slots).to(device)


class _Chunks(NamedTuple):
    """What both passes compute of the chunks without their states; the leading dims are n, H."""

    q: torch.Tensor
    """Scaled queries [G, C, D_k]."""
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    """[C, 1]."""
    log_decay: torch.Tensor
    """[C, D_k or 1]."""
    up: torch.Tensor
    """exp(b) [C, D_k or 1]."""
    down: torch.Tensor
    """exp(r) [C, D_k or 1]."""
    total: torch.Tensor
    """exp(b_C) [D_k or 1, 1]."""
    scores: torch.Tensor
    """A, then P without its diagonal [1 + G, C, C]."""
    reads: torch.Tensor
    """P [G C, C]."""
    system: torch.Tensor
    """A diag(beta) [C, C]."""
    solved_v: torch.Tensor
    """T v [C, D_v]."""
    w: torch.Tensor
    """W [C, D_k]."""
    transition: torch.Tensor
    """M [D_k, D_k]."""


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, q, k, v, beta, log_decay, initial_state, scale, counts
    ):
        x = _prepare(q, k, v, beta, log_decay, scale)
        local = (x.k * x.down * x.beta).transpose(-1, -2) @ x.solved_v
        states, final = _scan(x.transition, local, initial_state, counts)
        ctx.save_for_backward(q, k, v, beta, log_decay, states)
        ctx.scale, ctx.counts = scale, counts
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        u = torch.baddbmm(
            x.solved_v.flatten(0, 1), x.w.flatten(0, 1), states.flatten(0, 1), alpha=-1
        ).view_as(x.v)
        out = x.reads @ u.mul_(x.beta)
        out += (x.q * x.up.unsqueeze(2)).flatten(2, 3) @ states
        return out.view(*q.shape[:4], v.shape[-1]).to(q.dtype), final

    @staticmethod
    def backward(ctx: Any, dout, dfinal):  # type: ignore[no-untyped-def]
        q, k, v, beta, log_decay, states = ctx.saved_tensors
        x = _prepare(q, k, v, beta, log_decay, ctx.scale)
        dout = dout.to(x.v.dtype).flatten(2, 3)
        error = x.solved_v - x.w @ states
        u = error * x.beta
        q_up, k_up, k_down = x.q * x.up.unsqueeze(2), x.k * x.up, x.k * x.down

        du = x.reads.transpose(-1, -2) @ dout
        dlocal = q_up.flatten(2, 3).transpose(-1, -2) @ dout
        dlocal -= x.w.transpose(-1, -2) @ (du * x.beta)
        dleaving, dinitial = _scan_backward(x.transition, dlocal, dfinal, ctx.counts)
        du += k_down @ dleaving
        dv = torch.linalg.solve_triangular(
            x.system.transpose(-1, -2), du * x.beta, upper=True, unitriangular=True
        )
        dbeta = (error * (du - x.scores[:, :, 0].transpose(-1, -2) @ dv)).sum(-1, keepdim=True)

        du_products = (dout @ u.transpose(-1, -2)).view_as(x.scores[:, :, 1:])
        diagonal = du_products.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        dkey_products = -(dv @ u.transpose(-1, -2)).unsqueeze(2)
        dscores = torch.cat([dkey_products, du_products], 2).tril_(-1)
        dq_up = (dout @ states.transpose(-1, -2)).view_as(x.q)
        dk_up = -(dv @ states.transpose(-1, -2))
        dk_down = u @ dleaving.transpose(-1, -2)
        is_scalar = x.log_decay.shape[-1] == 1
        scores_backward = scalar_scores_backward if is_scalar else vector_scores_backward
        rows = torch.cat([x.k.unsqueeze(2), x.q], 2)
        drows, dk, dlog_decay = scores_backward(rows, x.k, x.log_decay, x.scores, dscores)

        dq = drows[:, :, 1:] + dq_up * x.up.unsqueeze(2) + diagonal * x.k.unsqueeze(2)
        dk += drows[:, :, 0] + dk_up * x.up + dk_down * x.down + (diagonal * x.q).sum(2)
        dup = (q_up * dq_up).sum(2) + k_up * dk_up
        ddown = k_down * dk_down
        dtotal = x.total * (states * dleaving).sum(-1, keepdim=True)
        if is_scalar:
            dup, ddown = dup.sum(-1, keepdim=True), ddown.sum(-1, keepdim=True)
            dtotal = dtotal.sum(-2, keepdim=True)
        dlog_decay += sums_from(dup) + exclusive_sums(ddown) + dtotal.transpose(-1, -2)
        grads = (dq * ctx.scale, dk, dv, dbeta, dlog_decay)
        inputs = (q, k, v, beta, log_decay)
        typed = (g.to(i.dtype) for g, i in zip(grads, inputs, strict=True))
        dinitial_state = dinitial.to(ctx.initial_dtype) if ctx.initial_dtype else None
        return *typed, dinitial_state, None, None


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor,
    scale: float,
) -> _Chunks:
    acc = torch.promote_types(q.dtype, torch.float32)
    q, k, v, beta, log_decay = (x.to(acc) for x in (q, k, v, beta, log_decay))
    q = q * scale
    score = scalar_scores if log_decay.shape[-1] == 1 else vector_scores
    scores = score(torch.cat([k.unsqueeze(2), q], 2), k, log_decay)
    system = scores[:, :, 0] * beta.transpose(-1, -2)
    reads = scores[:, :, 1:] + torch.diag_embed((q * k.unsqueeze(2)).sum(-1))
    cumulative = log_decay.cumsum(2)
    up, total = cumulative.exp(), cumulative[:, :, -1].exp().unsqueeze(-1)
    rest = F.pad(log_decay[:, :, 1:], (0, 0, 0, 1))
    down = sums_from(rest).exp_()
    solved = torch.linalg.solve_triangular(
        system, torch.cat([v, k * up], -1), upper=False, unitriangular=True
    )
    solved_v, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    transition = -(k * down * beta).transpose(-1, -2) @ w
    transition.diagonal(dim1=-2, dim2=-1).add_(total.squeeze(-1))
    return _Chunks(
        q, k, v, beta, log_decay, up, down, total, scores, reads.flatten(2, 3), system, solved_v,
        w, transition,
    )  # fmt: skip


def _scan(
    transition: torch.Tensor,
    local: torch.Tensor,
    initial_state: torch.Tensor | None,
    counts: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run S <- transition S + local over the chunks of all documents at once.

    Args:
        transition: [n, H, D_k, D_k]; local [n, H, D_k, D_v].
        counts: chunks of each document.

    Returns:
        The state that enters each chunk, as `local`, and the last of each document.
    """
    states = torch.empty_like(local)
    state = local.new_zeros(len(counts), *local.shape[1:])
    if initial_state is not None:
        state.copy_(initial_state)
    for documents, chunks in _schedule(counts, local.device):
        entering = state[documents]
        states[chunks] = entering
        state[documents] = local[chunks] + transition[chunks] @ entering
    return states, state


def _scan_backward(
    transition: torch.Tensor, dlocal: torch.Tensor, dfinal: torch.Tensor, counts: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the states that leave the chunks and of the initial states."""
    dleaving, dstate = torch.empty_like(dlocal), dfinal.clone()
    for documents, chunks in reversed(_schedule(counts, dlocal.device)):
        leaving = dstate[documents]
        dleaving[chunks] = leaving
        dstate[documents] = dlocal[chunks] + transition[chunks].transpose(-1, -2) @ leaving
    return dleaving, dstate


def _schedule(counts: list[int], device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return, for each step, the documents that still have a chunk and those chunks."""
    count = torch.tensor(counts)
    first = count.cumsum(0) - count
    steps = ((count > c).nonzero().squeeze(1) for c in range(max(counts)))
    return [(d.to(device), (first[d] + c).to(device)) for c, d in enumerate(steps)]
