"""The state that a run of tokens leaves behind, in closed form.

    S = sum_t diag(exp(r_t)) k_t^T v_t        r_t = sum of log_decay over the tokens after t

One matrix product instead of a recurrence; exponents are sums of decays, so never positive.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

TOKENS_AT_ONCE = 4096
"""Bounds the float32 copies of keys and values."""


def end_state(
    k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return where linear attention ends from a state of zero, and its decay over all tokens.

    Args:
        k: [1, T, H, D_k]; v [1, T, H, D_v].
        log_decay: None, [1, T, H] or [1, T, H, D_k].

    Returns:
        float32 (float64 for float64 inputs) [H, D_k, D_v], and [H, D_k or 1, 1] or None.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    if log_decay is None:
        state: torch.Tensor = _EndState.apply(k, v, None)
        return state, None
    log_decay = log_decay[0].to(wide)
    if log_decay.dim() == 2:
        log_decay = log_decay.unsqueeze(-1)
    state = _EndState.apply(k, v, log_decay)
    return state, log_decay.sum(0).exp().unsqueeze(-1)


class _EndState(torch.autograd.Function):
    """Keeps its inputs; log_decay is [T, H, D_k or 1]."""

    @staticmethod
    def forward(
        ctx: Any, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(k, v, log_decay)
        wide = torch.promote_types(k.dtype, torch.float32)
        state = torch.zeros(k.shape[2], k.shape[3], v.shape[3], dtype=wide, device=k.device)
        for rows, after in _chunks_from_the_end(log_decay, k.shape[1]):
            keys = _weigh(k[0, rows].to(wide), after)
            state += torch.einsum("thk,thv->hkv", keys, v[0, rows].to(wide))
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstate: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        k, v, log_decay = ctx.saved_tensors
        wide = dstate.dtype
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        dafter = None if log_decay is None else torch.empty_like(log_decay)
        for rows, after in _chunks_from_the_end(log_decay, k.shape[1]):
            keys = _weigh(k[0, rows].to(wide), after)
            dkeys = torch.einsum("thv,hkv->thk", v[0, rows].to(wide), dstate)
            dv[0, rows] = torch.einsum("thk,hkv->thv", keys, dstate).to(v.dtype)
            dk[0, rows] = _weigh(dkeys, after).to(k.dtype)
            if dafter is not None:
                parts = keys * dkeys
                dafter[rows] = parts if dafter.shape[2] > 1 else parts.sum(-1, keepdim=True)
        if dafter is None:
            return dk, dv, None
        # A token's decay weighs on all tokens before it.
        return dk, dv, torch.cat([torch.zeros_like(dafter[:1]), dafter[:-1].cumsum(0)])


def _chunks_from_the_end(
    log_decay: torch.Tensor | None, num_tokens: int
) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Yield rows and, for each, the decay summed over all later tokens; the last rows first."""
    later = None if log_decay is None else torch.zeros_like(log_decay[:1])
    for start in reversed(range(0, num_tokens, TOKENS_AT_ONCE)):
        rows = slice(start, min(start + TOKENS_AT_ONCE, num_tokens))
        if log_decay is None or later is None:
            yield rows, None
            continue
        from_here = log_decay[rows].flip(0).cumsum(0).flip(0) + later
        yield rows, torch.cat([from_here[1:], later])
        later = from_here[:1]


def _weigh(x: torch.Tensor, after: torch.Tensor | None) -> torch.Tensor:
    return x if after is None else x * after.exp()
