"""Definition of the gated delta rule: the recurrence, one token at a time."""

import torch

from ops.linear_attention.reference import recur_over_documents


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
    """See `ops.delta_rule.delta_rule`; differentiable by autograd."""
    tensors = (q, k, v, beta)
    return recur_over_documents(_recurrence, tensors, log_decay, scale, initial_state, cu_seqlens)


def _recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    decay: torch.Tensor | None,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H, D_k]; k, v, decay [T, H_state, ...]; beta [T, H_state]; state [H_state, D, D]."""
    group = q.shape[1] // k.shape[1]
    if state is None:
        state = k.new_zeros(k.shape[1], k.shape[2], v.shape[2])
    outs = [q.new_zeros(0, q.shape[1], v.shape[2])]
    for t in range(q.shape[0]):
        if decay is not None:
            step = decay[t] if decay.dim() == 3 else decay[t, :, None]
            state = step[..., None] * state
        error = v[t] - torch.einsum("hk,hkv->hv", k[t], state)
        state = state + k[t, :, :, None] * (beta[t, :, None] * error)[:, None, :]
        outs.append(torch.einsum("hk,hkv->hv", q[t], state.repeat_interleave(group, 0))[None])
    return torch.cat(outs), state
