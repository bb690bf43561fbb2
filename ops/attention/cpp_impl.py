"""Attention by a kernel in C++ for CPUs with AMX, compiled when first used.

The kernel is for causal attention without sinks, with a positive scale and heads of a multiple of
32; everything else is left to `torch_impl`.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ops.attention import torch_impl
from ops.cpp_build import load_kernel

HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 32, 256


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    window_size: int | None,
    num_sinks: int,
    scale: float,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ops.attention.attention`; cost grows with T x window_size, memory with T."""
    D, T = q.shape[3], q.shape[1]
    fits = D % HEAD_DIM_MULTIPLE == 0 and D <= MAX_HEAD_DIM and q.numel() > 0
    if not (fits and causal and num_sinks == 0 and scale > 0):
        return torch_impl.attention(
            q,
            k,
            v,
            causal=causal,
            window_size=window_size,
            num_sinks=num_sinks,
            scale=scale,
            cu_seqlens=cu_seqlens,
        )
    bounds = torch.tensor([0, T], dtype=torch.int32) if cu_seqlens is None else cu_seqlens
    window = T if window_size is None else min(window_size, T)
    out, lse = _Attention.apply(q, k, v, bounds.contiguous(), window, scale)
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bounds: torch.Tensor,
        window: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (_with_dense_heads(x) for x in (q, k, v))
        out, lse = load_kernel("attention").fwd(q, k, v, bounds, window, scale)
        ctx.save_for_backward(q, k, v, out, lse, bounds)
        ctx.window, ctx.scale = window, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, bounds = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None, None, None, None
        dout = torch.zeros_like(out) if dout is None else _with_dense_heads(dout)
        dlse = None if dlse is None else dlse.contiguous()
        grads = load_kernel("attention").bwd(
            dout, dlse, q, k, v, out, lse, bounds, ctx.window, ctx.scale
        )
        return *grads, None, None, None


def _with_dense_heads(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
