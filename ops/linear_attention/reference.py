"""Definition of gated linear attention: the recurrence, one token at a time."""

import itertools
from collections.abc import Callable

import torch


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    scale: float,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.linear_attention.linear_attention`; differentiable by autograd."""
    return recur_over_documents(_recurrence, (q, k, v), log_decay, scale, initial_state, cu_seqlens)


def recur_over_documents(
    recurrence: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    tensors: tuple[torch.Tensor, ...],
    log_decay: torch.Tensor | None,
    scale: float,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run recurrence(*tensors [T, ...], decay, state) over each document of tensors [B, T, ...].

    The first three tensors are q, k and v; out [B, T, H, D_v] has the dtype of q.
    """
    q, _, v = tensors[:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    outs, finals = [], []
    for n, (b, start, stop) in enumerate(_list_documents(q, cu_seqlens)):
        initial = None if initial_state is None else initial_state[n].to(dtype)
        decay = None if log_decay is None else log_decay[b, start:stop].to(dtype).exp()
        out, final = recurrence(*(x[b, start:stop].to(dtype) for x in tensors), decay, initial)
        outs.append(out * scale)
        finals.append(final)
    return torch.cat(outs).view(*q.shape[:3], v.shape[-1]).to(q.dtype), torch.stack(finals)


def _list_documents(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[tuple[int, int, int]]:
    """Return (row, start, stop) of the documents of x [B, T, ...]; without bounds a row is one."""
    if cu_seqlens is None:
        return [(b, 0, x.shape[1]) for b in range(x.shape[0])]
    return [(0, start, stop) for start, stop in itertools.pairwise(cu_seqlens.tolist())]


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    state: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See `ops.linear_attention.linear_attention_step`: a row of one token, for each of B."""
    decay = None if log_decay is None else log_decay.unsqueeze(1)
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    out, final = linear_attention(q, k, v, decay, scale, state, None)
    state.copy_(final)
    return out.squeeze(1)


def _recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H, D_k]; k, v, decay [T, H_state, ...]; state [H_state, D_k, D_v]."""
    group = q.shape[1] // k.shape[1]
    if state is None:
        state = k.new_zeros(k.shape[1], k.shape[2], v.shape[2])
    outs = [q.new_zeros(0, q.shape[1], v.shape[2])]
    for t in range(q.shape[0]):
        if decay is not None:
            step = decay[t] if decay.dim() == 3 else decay[t, :, None]
            state = step[..., None] * state
        state = state + k[t, :, :, None] * v[t, :, None, :]
        outs.append(torch.einsum("hk,hkv->hv", q[t], state.repeat_interleave(group, 0))[None])
    return torch.cat(outs), state
