"""Attention by a kernel in C++ for CPUs with AMX, compiled when first used.

The kernel is for causal attention without sinks and for attention to all keys, with a positive
scale and heads of a multiple of 32; everything else is left to `torch_impl`.
"""

import torch

from ops.attention import torch_impl
from ops.attention.autograd import Attention
from ops.attention.settings import Settings
from ops.cpp_build import load_kernel

HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 32, 256


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ops.attention.attention`; cost grows with T x window_size, memory with T."""
    out, lse = Attention.apply(q, k, v, settings, attention_fwd, attention_bwd)
    return out, lse


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, T, H, D] and lse [B, H, T], float32."""
    if not _fits(q, k, settings):
        return torch_impl.attention_fwd(q, k, v, settings)
    q, k, v = (_with_dense_heads(x) for x in (q, k, v))
    out, lse = load_kernel("attention").fwd(q, k, v, *_pattern(q, settings), settings.scale)
    return out, lse


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
    if not _fits(q, k, settings):
        return torch_impl.attention_bwd(dout, dlse, q, k, v, out, lse, settings)
    dout, q, k, v, out = (_with_dense_heads(x) for x in (dout, q, k, v, out))
    dlse = None if dlse is None else dlse.contiguous()
    inputs = (dout, dlse, q, k, v, out, lse.contiguous())
    dq, dk, dv = load_kernel("attention").bwd(*inputs, *_pattern(q, settings), settings.scale)
    return dq, dk, dv


def _fits(q: torch.Tensor, k: torch.Tensor, settings: Settings) -> bool:
    D = q.shape[3]
    if D % HEAD_DIM_MULTIPLE or D > MAX_HEAD_DIM or settings.scale <= 0:
        return False
    one_document = settings.documents is None or len(settings.documents) == 2
    takes_pattern = (settings.causal or one_document) and settings.num_sinks == 0
    return takes_pattern and q.numel() > 0 and k.numel() > 0


def _pattern(q: torch.Tensor, settings: Settings) -> tuple[torch.Tensor, int]:
    """Return the bounds of the documents and, as the kernel takes it, the window; 0: all keys."""
    T = q.shape[1]
    bounds = torch.tensor(settings.documents or (0, T), dtype=torch.int32)
    if not settings.causal:
        return bounds, 0
    return bounds, T if settings.window_size is None else min(settings.window_size, T)


def _with_dense_heads(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
