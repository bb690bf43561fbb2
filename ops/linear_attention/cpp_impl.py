"""Linear attention by a kernel in C++ for CPUs with AMX, compiled when first used.

The kernel is for head dims of a multiple of 32; values are padded to it, and keys of another one
are left to `torch_impl`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ops.cpp_build import load_kernel
from ops.linear_attention import torch_impl

HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 32, 256


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    scale: float,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ops.linear_attention.linear_attention` in time and memory linear in T."""
    D_k, D_v, pad = q.shape[3], v.shape[3], -v.shape[3] % HEAD_DIM_MULTIPLE
    fits = D_k % HEAD_DIM_MULTIPLE == 0 and 0 < D_k <= MAX_HEAD_DIM and D_v + pad <= MAX_HEAD_DIM
    if not fits or not q.numel() or not D_v:
        return torch_impl.linear_attention(q, k, v, log_decay, scale, initial_state, cu_seqlens)
    if pad:
        # Values of zero stay zero. With a few more of them the kernel is still the faster one.
        initial_state = None if initial_state is None else F.pad(initial_state, (0, pad))
        wide = linear_attention(
            q, k, F.pad(v, (0, pad)), log_decay, scale, initial_state, cu_seqlens
        )
        return wide[0][..., :D_v], wide[1][..., :D_v]
    log_decay = None if log_decay is None else log_decay.float()
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    bounds = torch.tensor([0, q.shape[1]], dtype=torch.int32) if cu_seqlens is None else cu_seqlens
    out, final_state = _LinearAttention.apply(
        q, k, v, log_decay, initial_state, bounds.contiguous(), scale
    )
    return out, final_state


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_decay: torch.Tensor | None,
        initial_state: torch.Tensor | None,
        bounds: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (_with_dense_channels(x) for x in (q, k, v))
        log_decay = None if log_decay is None else _with_dense_channels(log_decay)
        inputs = (q, k, v, log_decay, initial_state, bounds)
        out, final_state, checkpoints = load_kernel("linear_attention").fwd(
            *inputs, scale, any(ctx.needs_input_grad)
        )
        ctx.save_for_backward(*inputs, checkpoints)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, final_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: torch.Tensor | None, dfinal: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if dout is None and dfinal is None:
            return (None,) * 7
        q, _, v = ctx.saved_tensors[:3]
        if dout is None:
            dout = v.new_zeros(*q.shape[:3], v.shape[3])
        dfinal = None if dfinal is None else dfinal.contiguous()
        grads = load_kernel("linear_attention").bwd(
            _with_dense_channels(dout), dfinal, *ctx.saved_tensors, ctx.scale
        )
        return *grads, None, None


def _with_dense_channels(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 3 or x.stride(3) == 1 else x.contiguous()
