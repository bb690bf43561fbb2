"""Mixture of experts in Triton: routing, and the way of rows to their experts and back.

Sorting is PyTorch's; nothing here waits for the device or loops over experts on the host.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ops.moe.order import invert, sort_by_expert
from ops.moe.triton_grouped import SEARCH as GROUPED_SEARCH
from ops.moe.triton_grouped import grouped_matmul, list_grouped_builds
from ops.triton_build import Build
from ops.triton_runtime import Blocks, find_blocks

__all__ = ["SEARCH", "grouped_matmul", "list_builds", "permute", "route", "unpermute"]

_ROW_SEARCH: tuple[Blocks, ...] = tuple(
    {"BLOCK_N": rows, "BLOCK_E": columns, "num_warps": warps, "num_stages": 1}
    for rows, columns, warps in ((1, 512, 2), (1, 1024, 4), (1, 2048, 4), (2, 1024, 4), (4, 512, 4))
)
SEARCH: dict[str, tuple[Blocks, ...]] = GROUPED_SEARCH | {
    "route": tuple(
        {"BLOCK_N": rows, "num_warps": warps, "num_stages": 1}
        for rows, warps in ((1, 1), (1, 4), (4, 1), (4, 4), (4, 8), (16, 4), (32, 4))
    ),
    "spread": _ROW_SEARCH,
    "combine": _ROW_SEARCH,
}


def route(
    logits: torch.Tensor, k: int, normalize: bool, score: str, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.moe.route`."""
    bias = None if bias is None else bias.contiguous()
    weights, experts = _Route.apply(logits.contiguous(), k, normalize, score, bias)
    return weights, experts


def permute(
    x: torch.Tensor, experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.moe.permute`."""
    order, counts = sort_by_expert(experts, num_experts)
    return _Permute.apply(x.contiguous(), order, experts.shape[1]), order, counts


def unpermute(y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """See `ops.moe.unpermute`."""
    out: torch.Tensor = _Unpermute.apply(y.contiguous(), order.contiguous(), weights.contiguous())
    return out


def list_builds(arch: str) -> list[Build]:
    """Return every kernel in every combination that ships."""
    builds = list_grouped_builds(arch)
    names = {"p_order": "i64", "p_rows": "i64", "p_experts": "i64"}
    names |= {"p_weights": "fp32", "p_dweights": "fp32", "p_bias": "fp32"}
    types = {name: f"*{dtype}" for name, dtype in names.items()}
    movers = (
        (_spread_kernel, "spread", ("p_weights", "p_y", "p_dweights")),
        (_combine_kernel, "combine", ("p_weights",)),
    )
    for dtype in ("bf16", "fp16", "fp32"):
        for kernel, name, optional in movers:
            blocks, absent = find_blocks("moe", name, 4096, arch), dict.fromkeys(optional)
            builds.append(Build(kernel, f"{dtype}-plain", dtype, absent, blocks, types))
            builds.append(Build(kernel, f"{dtype}-weighted", dtype, {}, blocks, types))
        settings = itertools.product((True, False), ("", "-sigmoid"), (64, 256, 1024))
        for normalize, score, size in settings:
            blocks = find_blocks("moe", "route", size, arch)
            case = f"{dtype}-G{size}{score}-{'normalized' if normalize else 'plain'}"
            constants: dict[str, Any] = {"NORMALIZE": normalize, "BLOCK_G": size}
            constants |= {"SCORE": score.removeprefix("-") or "softmax"}
            # Each constant with a bias and without, not every pair of them.
            absent = {"p_bias": None} if normalize == (score == "") else {}
            values = constants | absent
            builds.append(Build(_route_fwd_kernel, case, dtype, values, blocks, types))
            builds.append(Build(_route_bwd_kernel, case, dtype, constants, blocks, types))
    return builds


def route_fwd(
    logits: torch.Tensor, k: int, normalize: bool, score: str, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights, float32, and experts, int64, both [N, k], of contiguous logits and bias."""
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(num_tokens, k, dtype=torch.int64, device=logits.device)
    blocks = find_blocks("moe", "route", num_experts, logits.device)
    _route_fwd_kernel[(triton.cdiv(num_tokens, blocks["BLOCK_N"]),)](
        logits,
        bias,
        weights,
        experts,
        num_tokens,
        num_experts,
        k,
        NORMALIZE=normalize,
        SCORE=score,
        BLOCK_G=triton.next_power_of_2(num_experts),
        **blocks,
    )
    return weights, experts


def route_bwd(
    dweights: torch.Tensor,
    logits: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    normalize: bool,
    score: str,
) -> torch.Tensor:
    """Return dlogits [N, G]."""
    num_tokens, num_experts = logits.shape
    dlogits = torch.empty_like(logits)
    blocks = find_blocks("moe", "route", num_experts, logits.device)
    _route_bwd_kernel[(triton.cdiv(num_tokens, blocks["BLOCK_N"]),)](
        logits,
        weights,
        experts,
        dweights.contiguous(),
        dlogits,
        num_tokens,
        num_experts,
        weights.shape[1],
        NORMALIZE=normalize,
        SCORE=score,
        BLOCK_G=triton.next_power_of_2(num_experts),
        **blocks,
    )
    return dlogits


def unpermute_bwd(
    dout: torch.Tensor, y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dy [N k, E] and dweights [N, k]."""
    dy, dweights = torch.empty_like(y), torch.empty_like(weights)
    _launch_spread(dout.contiguous(), order, weights, y, dweights, dy, weights.shape[1])
    return dy, dweights


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        k: int,
        normalize: bool,
        score: str,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, experts = route_fwd(logits, k, normalize, score, bias)
        ctx.save_for_backward(logits, weights, experts)
        ctx.settings = (normalize, score)
        ctx.mark_non_differentiable(experts)
        return weights, experts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        logits, weights, experts = ctx.saved_tensors
        dlogits = route_bwd(dweights, logits, weights, experts, *ctx.settings)
        return dlogits, None, None, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        sorted_x = x.new_empty(len(order), x.shape[1])
        _launch_spread(x, order, None, None, None, sorted_x, k)
        return sorted_x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsorted: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return _combine(dsorted.contiguous(), order, None, ctx.k), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(y, order, weights)
        return _combine(y, order, weights, weights.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy, dweights = unpermute_bwd(dout, *ctx.saved_tensors)
        return dy, None, dweights


def _launch_spread(
    x: torch.Tensor,
    order: torch.Tensor,
    weights: torch.Tensor | None,
    y: torch.Tensor | None,
    dweights: torch.Tensor | None,
    out: torch.Tensor,
    k: int,
) -> None:
    num_rows, size = out.shape
    blocks = find_blocks("moe", "spread", size, x.device)
    grid = (triton.cdiv(num_rows, blocks["BLOCK_N"]),)
    _spread_kernel[grid](x, order, weights, y, dweights, out, num_rows, size, k, **blocks)


def _combine(
    y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor | None, k: int
) -> torch.Tensor:
    """Return [N, E]: the sum over the k rows of each token, times weights [N, k] where given."""
    rows, size = invert(order, k), y.shape[1]
    out = y.new_empty(len(rows), size)
    blocks = find_blocks("moe", "combine", size, y.device)
    grid = (triton.cdiv(len(rows), blocks["BLOCK_N"]), triton.cdiv(size, blocks["BLOCK_E"]))
    _combine_kernel[grid](y, rows, weights, out, len(rows), size, k, **blocks)
    return out


@triton.jit
def _route_fwd_kernel(  # type: ignore[no-untyped-def]
    p_logits,
    p_bias,
    p_weights,
    p_experts,
    num_tokens,
    num_experts,
    k,
    NORMALIZE: tl.constexpr,
    SCORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    cols = tl.arange(0, BLOCK_G)[None, :]
    b_inside = cols < num_experts
    b_mask = (rows < num_tokens) & b_inside
    b_logits = tl.load(p_logits + rows * num_experts + cols, mask=b_mask, other=0.0).to(tl.float32)
    b_logits = tl.where(b_inside, b_logits, float("-inf"))
    b_keys = b_logits
    if p_bias is not None:
        b_keys = _score(b_logits, b_inside, False, SCORE)
        b_keys += tl.load(p_bias + cols, mask=b_inside, other=0.0)
    # NaN would equal no maximum, and its slot would hold no expert: it ranks first instead.
    b_keys = tl.where(b_keys == b_keys, b_keys, float("inf"))
    b_slots = tl.zeros((BLOCK_N, BLOCK_G), tl.int32) + k
    for slot in range(k):
        b_open = b_inside & (b_slots == k)
        b_top = tl.max(tl.where(b_open, b_keys, float("-inf")), axis=1)[:, None]
        b_first = tl.min(tl.where(b_open & (b_keys == b_top), cols, BLOCK_G), axis=1)[:, None]
        b_slots = tl.where(cols == b_first, slot, b_slots)
    b_chosen = b_mask & (b_slots < k)
    b_weights = _score(b_logits, b_slots < k if NORMALIZE else b_inside, NORMALIZE, SCORE)
    at_slot = rows * k + b_slots
    tl.store(p_weights + at_slot, b_weights, mask=b_chosen)
    tl.store(p_experts + at_slot, tl.broadcast_to(cols, b_slots.shape).to(tl.int64), mask=b_chosen)


@triton.jit
def _score(  # type: ignore[no-untyped-def]
    b_logits, b_among, NORMALIZE: tl.constexpr, SCORE: tl.constexpr
):
    """Return scores where b_among holds, 0 elsewhere; NORMALIZE or a softmax: of sum 1."""
    b_logits = tl.where(b_among, b_logits, float("-inf"))
    if SCORE == "softmax" or NORMALIZE:
        # Scores are scaled so that the largest does not vanish.
        b_top = tl.max(b_logits, axis=1)[:, None]
    if SCORE == "softmax":
        b_scores = tl.exp(b_logits - b_top)
    else:
        b_low = tl.minimum(b_logits, 0.0)
        b_scores = tl.exp(b_low - tl.minimum(b_top, 0.0) if NORMALIZE else b_low)
        b_scores /= 1.0 + tl.exp(-tl.abs(b_logits))
    if SCORE == "softmax" or NORMALIZE:
        b_scores /= tl.sum(b_scores, axis=1)[:, None]
    return b_scores


@triton.jit
def _route_bwd_kernel(  # type: ignore[no-untyped-def]
    p_logits,
    p_weights,
    p_experts,
    p_dweights,
    p_dlogits,
    num_tokens,
    num_experts,
    k,
    NORMALIZE: tl.constexpr,
    SCORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    cols = tl.arange(0, BLOCK_G)[None, :]
    b_mask = (rows < num_tokens) & (cols < num_experts)
    b_probs = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    b_dlogits = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    for slot in range(k):
        b_expert = tl.load(p_experts + rows * k + slot, mask=rows < num_tokens, other=-1)
        b_weight = tl.load(p_weights + rows * k + slot, mask=rows < num_tokens, other=0.0)
        b_dweight = tl.load(p_dweights + rows * k + slot, mask=rows < num_tokens, other=0.0)
        b_probs += tl.where(cols == b_expert, b_weight, 0.0)
        b_dlogits += tl.where(cols == b_expert, b_weight * b_dweight, 0.0)
    if SCORE == "sigmoid" or not NORMALIZE:
        b_logits = tl.load(p_logits + rows * num_experts + cols, mask=b_mask, other=0.0)
        b_logits = b_logits.to(tl.float32)
    if SCORE == "softmax" and not NORMALIZE:
        b_probs = _score(b_logits, cols < num_experts, NORMALIZE, SCORE)
    if SCORE == "softmax" or NORMALIZE:
        b_dlogits -= b_probs * tl.sum(b_dlogits, axis=1)[:, None]
    if SCORE == "sigmoid":
        b_dlogits *= _score(-b_logits, cols < num_experts, False, SCORE)
    b_dlogits = b_dlogits.to(p_dlogits.dtype.element_ty)
    tl.store(p_dlogits + rows * num_experts + cols, b_dlogits, mask=b_mask)


@triton.jit
def _spread_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_order,
    p_weights,
    p_y,
    p_dweights,
    p_out,
    num_rows,
    size,
    k,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Write sorted rows from their tokens, weighted and multiplied with rows of p_y where given."""
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    b_mask = rows < num_rows
    b_flat = tl.load(p_order + rows, mask=b_mask, other=0)
    p_token = p_x + (b_flat // k) * size
    b_dot = tl.zeros((BLOCK_N, 1), tl.float32)
    for start in range(0, size, BLOCK_E):
        cols = (start + tl.arange(0, BLOCK_E))[None, :]
        b_inside = b_mask & (cols < size)
        b_out = tl.load(p_token + cols, mask=b_inside, other=0.0).to(tl.float32)
        if p_weights is not None:
            b_y = tl.load(p_y + rows * size + cols, mask=b_inside, other=0.0).to(tl.float32)
            b_dot += tl.sum(b_out * b_y, axis=1)[:, None]
            b_out *= tl.load(p_weights + b_flat, mask=b_mask, other=0.0)
        tl.store(p_out + rows * size + cols, b_out.to(p_out.dtype.element_ty), mask=b_inside)
    if p_weights is not None:
        tl.store(p_dweights + b_flat, b_dot, mask=b_mask)


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    p_y,
    p_rows,
    p_weights,
    p_out,
    num_tokens,
    size,
    k,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sum the k rows of each token, weighted where weights are given."""
    tokens = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    cols = (tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
    b_mask = tokens < num_tokens
    b_inside = b_mask & (cols < size)
    b_out = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for slot in range(k):
        b_rows = tl.load(p_rows + tokens * k + slot, mask=b_mask, other=0)
        b_y = tl.load(p_y + b_rows * size + cols, mask=b_inside, other=0.0).to(tl.float32)
        if p_weights is not None:
            b_y *= tl.load(p_weights + tokens * k + slot, mask=b_mask, other=0.0)
        b_out += b_y
    tl.store(p_out + tokens * size + cols, b_out.to(p_out.dtype.element_ty), mask=b_inside)
