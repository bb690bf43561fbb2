"""Attention in PyTorch for any device, without anything of size T x T.

The visible keys of a document fall in two parts: its first keys that all queries see (the sinks;
without causal all keys) and a causal band over the others. The forward pass attends to each part
and merges the two by their log-sum-exp; the backward pass recomputes tiles of both.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ops.attention.autograd import Attention
from ops.attention.settings import Settings
from ops.attention.tiles import Visibility
from ops.attention.torch_backward import attend_backward
from ops.attention.torch_forward import attend, attend_band
from ops.attention.torch_merge import merge as merge
from ops.attention.torch_merge import merge_fwd


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ops.attention.attention`; cost grows with T x window_size, memory with T."""
    out, lse = Attention.apply(q, k, v, settings, attention_fwd, attention_bwd)
    return out, lse


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, T, H, D] and lse [B, H, T], float32 (float64 for float64 inputs)."""
    out, lse = _map_documents(_attend_rows, (q, k, v), settings)
    return out, lse.mT.contiguous()


def attention_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk, dv in the inputs' shapes and dtype.

    out and lse may be those of a softmax over more keys than k holds: then the gradients are the
    share of these keys.
    """
    inputs = (dout, None if dlse is None else dlse.mT, q, k, v, out, lse.mT)
    dq, dk, dv = _map_documents(_attend_rows_backward, inputs, settings)
    return dq, dk, dv


@dataclass(frozen=True)
class _Run:
    """Consecutive packed documents of equal length."""

    start: int
    count: int
    length: int

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """View the run's tokens [1, T, ...] as rows [count, length, ...]."""
        tokens = x[0, self.start : self.start + self.count * self.length]
        return tokens.unflatten(0, (self.count, self.length))


def _equal_documents(bounds: tuple[int, ...]) -> list[_Run]:
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    runs, start = [], 0
    for length, documents in itertools.groupby(length for length in lengths if length > 0):
        runs.append(_Run(start, len(list(documents)), length))
        start += runs[-1].count * length
    return runs


def _map_documents(
    compute: Callable[..., tuple[torch.Tensor, ...]],
    inputs: tuple[torch.Tensor | None, ...],
    settings: Settings,
) -> tuple[torch.Tensor, ...]:
    """Call `compute` with rows [B, T, ...] of one document each and put its results together."""
    if settings.documents is None:
        return compute(*inputs, settings)
    results: tuple[torch.Tensor, ...] = ()
    for run in _equal_documents(settings.documents):
        parts = compute(*(None if x is None else run.rows(x) for x in inputs), settings)
        num_tokens = settings.documents[-1]
        results = results or tuple(x.new_empty(1, num_tokens, *x.shape[2:]) for x in parts)
        for result, part in zip(results, parts, strict=True):
            run.rows(result).copy_(part)
    return results


def _attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, T, H, D] and lse [B, T, H]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, D]
    window, scale = settings.window_size, settings.scale
    num_open = settings.count_open_keys(k.shape[2])
    if num_open == 0:
        out, lse = attend_band(q, k, v, window, scale)
        return out.transpose(1, 2), lse.mT
    out, lse = attend(q, k[:, :, :num_open], v[:, :, :num_open], scale)
    out = out.transpose(1, 2)
    if num_open < k.shape[2]:
        band_out, band_lse = attend_band(
            q[:, :, num_open:], k[:, :, num_open:], v[:, :, num_open:], window, scale
        )
        late_out, late_lse = merge_fwd(
            out[:, num_open:], lse[:, :, num_open:], band_out.transpose(1, 2), band_lse
        )
        out = torch.cat((out[:, :num_open], late_out), dim=1)
        lse = torch.cat((lse[:, :, :num_open], late_lse), dim=2)
    return out, lse.mT


def _attend_rows_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk and dv; dlse and lse are [B, T, H]."""
    num_open = settings.count_open_keys(k.shape[1])
    window = k.shape[1] if settings.window_size is None else settings.window_size
    visibility = Visibility(num_open, min(window, k.shape[1]))
    dlse = None if dlse is None else dlse.mT
    return attend_backward(dout, dlse, q, k, v, out, lse.mT, visibility, settings.scale)
