"""Attention in Triton for NVIDIA and AMD GPUs; nothing of size T x T, cost as T x visible keys."""

import torch

from ops.attention.autograd import Attention
from ops.attention.settings import Settings
from ops.attention.triton_backward import attend_backward
from ops.attention.triton_builds import SEARCH, list_builds
from ops.attention.triton_forward import attend
from ops.attention.triton_merge import merge
from ops.attention.triton_visibility import build_table

__all__ = ["SEARCH", "attention", "attention_bwd", "attention_fwd", "list_builds", "merge"]

MAX_HEAD_DIM = 256


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ops.attention.attention`.

    Raises:
        ValueError: heads of more than 256 values.
    """
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"q has heads of {q.shape[-1]} values, triton takes at most {MAX_HEAD_DIM}; "
            "use ops.attention=torch"
        )
    out, lse = Attention.apply(q, k, v, settings, attention_fwd, attention_bwd)
    return out, lse


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, T, H, D] and lse [B, H, T], float32."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return attend(q, k, v, build_table(q, k, settings), settings.scale)


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
    dout, q, k, v, out, lse = (x.contiguous() for x in (dout, q, k, v, out, lse))
    dlse = None if dlse is None else dlse.contiguous()
    table = build_table(q, k, settings)
    return attend_backward(dout, dlse, q, k, v, out, lse, table, settings.scale)
