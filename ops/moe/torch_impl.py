"""Mixture of experts in PyTorch for any device: the products of the experts run in a loop."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from ops.moe.autograd import GroupedMatmul, Products
from ops.moe.order import invert, sort_by_expert


def route(
    logits: torch.Tensor, k: int, normalize: bool, score: str, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.moe.route`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    keys = logits.detach()
    if bias is not None:
        keys = wide.detach()
        # Not sigmoid, which rounds the last elements of a tensor in their own way: no tie is safe.
        keys = bias + (keys.softmax(dim=1) if score == "softmax" else logsigmoid(keys).exp())
    # Not topk, which orders equal ones as it likes.
    experts = keys.sort(dim=1, descending=True, stable=True).indices[:, :k]
    if score == "softmax" and not normalize:
        return wide.softmax(dim=1).gather(1, experts), experts
    chosen = wide.gather(1, experts)
    if not normalize:
        return chosen.sigmoid(), experts
    # Over their sum, scores are the softmax of their logarithms, and logits are those of a softmax.
    return (chosen if score == "softmax" else logsigmoid(chosen)).softmax(dim=1), experts


def permute(
    x: torch.Tensor, experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.moe.permute`."""
    order, counts = sort_by_expert(experts, num_experts)
    return _Permute.apply(x, order, experts.shape[1]), order, counts


def unpermute(y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """See `ops.moe.unpermute`."""
    out: torch.Tensor = _Unpermute.apply(y, order, weights)
    return out


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """See `ops.moe.grouped_matmul`."""
    products = Products(grouped_matmul_fwd, grouped_matmul_dx, grouped_matmul_dweight)
    out: torch.Tensor = GroupedMatmul.apply(x, weight, tuple(counts.tolist()), products)
    return out


def unpermute_bwd(
    dout: torch.Tensor, y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dy [N k, E] and dweights [N, k]."""
    rows = dout[order // weights.shape[1]]
    dy = (rows * weights.flatten()[order, None]).to(y.dtype)
    dots = (rows.to(weights.dtype) * y).sum(dim=1)
    return dy, dots[invert(order, weights.shape[1])]


def grouped_matmul_fwd(
    x: torch.Tensor, weight: torch.Tensor, counts: tuple[int, ...]
) -> torch.Tensor:
    """Return out [M, F]."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    for rows, matrix, part in zip(x.split(counts), weight, out.split(counts), strict=True):
        torch.mm(rows, matrix.mT, out=part)
    return out


def grouped_matmul_dx(
    dout: torch.Tensor, weight: torch.Tensor, counts: tuple[int, ...]
) -> torch.Tensor:
    """Return dx [M, E]."""
    return grouped_matmul_fwd(dout, weight.mT, counts)


def grouped_matmul_dweight(
    dout: torch.Tensor, x: torch.Tensor, counts: tuple[int, ...]
) -> torch.Tensor:
    """Return dweight [G, F, E]."""
    dweight = x.new_empty(len(counts), dout.shape[1], x.shape[1])
    for drows, rows, part in zip(dout.split(counts), x.split(counts), dweight, strict=True):
        torch.mm(drows.mT, rows, out=part)
    return dweight


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return x[order // k]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsorted: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return _combine(dsorted, invert(order, ctx.k), None), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(y, order, weights)
        return _combine(y, invert(order, weights.shape[1]), weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy, dweights = unpermute_bwd(dout, *ctx.saved_tensors)
        return dy, None, dweights


def _combine(y: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return [N, E]: the sum over k of y[rows [N, k]], times weights [N, k] where given."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    out = torch.zeros(len(rows), y.shape[1], dtype=dtype, device=y.device)
    for slot in range(rows.shape[1]):
        part = y[rows[:, slot]]
        out += part if weights is None else part * weights[:, slot, None]
    return out.to(y.dtype)
