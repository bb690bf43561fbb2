"""The state that a run of tokens leaves behind, in closed form.

    S = sum_t diag(exp(r_t)) k_t^T v_t        r_t = sum of log_decay over the tokens after t

One matrix product instead of a recurrence; exponents are sums of decays, so never positive.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

TOKENS_AT_ONCE = 1024
"""Bounds the float32 copies of keys and values."""
TOKENS_PER_BLOCK = 64
MIN_LOG_DECAY = -1e4


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
        for rows, weight in _chunks_from_the_end(log_decay, k.shape[1]):
            keys = _weigh(k[0, rows].to(wide), weight)
            state += torch.einsum("thk,thv->hkv", keys, v[0, rows].to(wide))
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstate: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        k, v, log_decay = ctx.saved_tensors
        wide = dstate.dtype
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        dafter = None if log_decay is None else torch.empty_like(log_decay)
        for rows, weight in _chunks_from_the_end(log_decay, k.shape[1]):
            keys = _weigh(k[0, rows].to(wide), weight)
            dkeys = torch.einsum("thv,hkv->thk", v[0, rows].to(wide), dstate)
            dv[0, rows] = torch.einsum("thk,hkv->thv", keys, dstate)
            dk[0, rows] = _weigh(dkeys, weight)
            if dafter is not None:
                parts = keys * dkeys
                dafter[rows] = parts if dafter.shape[2] > 1 else parts.sum(-1, keepdim=True)
        if dafter is None:
            return dk, dv, None
        # A token's decay weighs on all tokens before it.
        return dk, dv, _sum_others(dafter, later=False)


def _chunks_from_the_end(
    log_decay: torch.Tensor | None, num_tokens: int
) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Yield rows and exp(the decay summed over all later tokens) of each; the last rows first."""
    later = None if log_decay is None else torch.zeros_like(log_decay[:1])
    for start in reversed(range(0, num_tokens, TOKENS_AT_ONCE)):
        rows = slice(start, min(start + TOKENS_AT_ONCE, num_tokens))
        if log_decay is None or later is None:
            yield rows, None
            continue
        decay = log_decay[rows].clamp(min=MIN_LOG_DECAY)
        after = _sum_others(decay, later=True) + later
        later = after[:1] + decay[:1]
        yield rows, _exp(after)


def _sum_others(x: torch.Tensor, *, later: bool) -> torch.Tensor:
    """Return for each row of x [T, ...] the sum of all later rows, or of all earlier ones.

    By products inside blocks of rows: a sum that runs along the rows is slow on a CPU.
    """
    rows = x.flatten(1)
    if padding := -len(rows) % TOKENS_PER_BLOCK:
        rows = F.pad(rows, (0, 0, 0, padding))
    blocks = rows.unflatten(0, (-1, TOKENS_PER_BLOCK))
    ones = x.new_ones(TOKENS_PER_BLOCK, TOKENS_PER_BLOCK)
    inside = (ones.triu(1) if later else ones.tril(-1)) @ blocks
    totals = blocks.sum(1)
    none = torch.zeros_like(totals[:1])
    if later:
        others = torch.cat([totals[1:].flip(0).cumsum(0).flip(0), none])
    else:
        others = torch.cat([none, totals[:-1].cumsum(0)])
    return (inside + others[:, None]).flatten(0, 1)[: len(x)].view_as(x)


def _exp(x: torch.Tensor) -> torch.Tensor:
    """Return exp(x), zero where that is close to the least number that there is.

    On a CPU subnormal numbers and -inf are slow, to come by and to compute with.
    """
    least = 0.9 * math.log(torch.finfo(x.dtype).tiny)
    return F.threshold(x.clamp(min=least).exp(), 2 * math.exp(least), 0.0)


def _weigh(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return x if weight is None else x * weight
