"""Ulysses (arXiv:2309.14509): ranks exchange heads for tokens, attend to all tokens with a few
heads each, and exchange back.

Where the ranks do not divide the heads, zero query heads are added inside each group, so that every
query head still meets its key head; a key head that several ranks read goes to each of them.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from parallel.sequence.context import SequenceContext


@dataclass(frozen=True)
class HeadPlan:
    """Which heads each rank computes; -1 stands for a head of zeros."""

    num_heads: int
    num_kv_heads: int
    query: tuple[tuple[int, ...], ...]
    """Per rank, its query heads."""
    kv: tuple[tuple[int, ...], ...]
    """Per rank, its key and value heads."""

    def select_kv(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """Return the heads of `rank` from x [B, T, H_kv, D]."""
        return _select(x, self.kv[rank])


def plan_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> HeadPlan:
    """Share out heads so that every rank gets as many, with the least to send.

    Raises:
        ValueError: more than half of the query heads would be zeros.
    """
    total, padded_group = _pad(num_heads, num_kv_heads, num_ranks)
    if total * padded_group > 2 * num_heads:
        near = [
            n
            for n in range(1, 2 * num_heads + 1)
            if math.prod(_pad(num_heads, num_kv_heads, n)) <= 2 * num_heads
        ]
        raise ValueError(
            f"parallel.ulysses={num_ranks} would pad {num_heads} query heads on {num_kv_heads} "
            f"key heads to {total * padded_group}, more than twice as many; use "
            f"parallel.ulysses={' or '.join(map(str, near))}, or parallel.ring"
        )
    group, sharers = num_heads // num_kv_heads, max(1, num_ranks // total)
    each, part = max(1, total // num_ranks), padded_group // sharers
    query, kv = [], []
    for rank in range(num_ranks):
        heads = range(rank // sharers * each, (rank // sharers + 1) * each)
        places = range(rank % sharers * part, (rank % sharers + 1) * part)
        kv.append(tuple(head if head < num_kv_heads else -1 for head in heads))
        query.append(
            tuple(
                head * group + place if head < num_kv_heads and place < group else -1
                for head in heads
                for place in places
            )
        )
    return HeadPlan(num_heads, num_kv_heads, tuple(query), tuple(kv))


def scatter_heads(
    tensors: tuple[torch.Tensor, ...], plan: HeadPlan, context: SequenceContext
) -> tuple[torch.Tensor, ...]:
    """Give every rank of the Ulysses axis its heads of all their tokens; all of them must call.

    Args:
        tensors: q [1, T, H, D], k and v [1, T, H_kv, D] of this rank's tokens.

    Returns:
        q, k and v [1, T_axis, heads, D]. Gradients of a head that went to several ranks are summed.
    """
    if context.comm.mesh.ulysses.size == 1:
        return tensors
    results: tuple[torch.Tensor, ...] = _ScatterHeads.apply(plan, context, *tensors)
    return results


def gather_heads(out: torch.Tensor, plan: HeadPlan, context: SequenceContext) -> torch.Tensor:
    """Return all heads [1, T, H, D] of this rank's tokens from `out` [1, T_axis, heads, D]."""
    if context.comm.mesh.ulysses.size == 1:
        return out
    result: torch.Tensor = _GatherHeads.apply(plan, context, out)
    return result


class _ScatterHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: HeadPlan, context: SequenceContext, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.plan, ctx.context = plan, context
        heads = (plan.query, plan.kv, plan.kv)
        return _to_heads(tensors, heads[: len(tensors)], context)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan = ctx.plan
        heads = ((plan.query, plan.num_heads), *((plan.kv, plan.num_kv_heads),) * 2)
        return None, None, *_to_tokens(grads, heads, ctx.context)


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: HeadPlan, context: SequenceContext, out: torch.Tensor
    ) -> torch.Tensor:
        ctx.plan, ctx.context = plan, context
        return _to_tokens((out,), ((plan.query, plan.num_heads),), context)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *_to_heads((dout,), (ctx.plan.query,), ctx.context)


Heads = tuple[tuple[int, ...], ...]


def _to_heads(
    tensors: tuple[torch.Tensor, ...], heads: tuple[Heads, ...], context: SequenceContext
) -> tuple[torch.Tensor, ...]:
    """Send each rank its heads of this rank's tokens: [1, T, H, D] -> [1, T_axis, heads, D]."""
    axis, counts = context.comm.mesh.ulysses, _count_tokens(context)
    parts = [
        torch.cat([_select(x, h[rank]) for x, h in zip(tensors, heads, strict=True)], dim=2)
        for rank in range(axis.size)
    ]
    width, dim = parts[0].shape[2:]
    shapes = [torch.Size((1, count, width, dim)) for count in counts]
    received = context.comm.all_to_all(parts, shapes, axis)
    context.comm.settle(axis)
    sizes = [len(h[axis.index]) for h in heads]
    return tuple(x.contiguous() for x in torch.cat(received, dim=1).split(sizes, dim=2))


def _to_tokens(
    tensors: tuple[torch.Tensor, ...],
    heads: tuple[tuple[Heads, int], ...],
    context: SequenceContext,
) -> tuple[torch.Tensor, ...]:
    """Send each rank its tokens of this rank's heads and sum what comes for each head.

    Args:
        tensors: [1, T_axis, heads, D].
        heads: for each tensor the heads of every rank, and their number before padding.
    """
    axis, counts = context.comm.mesh.ulysses, _count_tokens(context)
    sizes = [len(h[axis.index]) for h, _ in heads]
    parts = list(torch.cat(tensors, dim=2).split(counts, dim=1))
    shape = torch.Size((1, counts[axis.index], sum(sizes), tensors[0].shape[3]))
    received = context.comm.all_to_all(parts, [shape] * axis.size, axis)
    context.comm.settle(axis)
    results = []
    for index, (ranks_heads, num_heads) in enumerate(heads):
        own = [x.split(sizes, dim=2)[index] for x in received]
        flat = [head for rank_heads in ranks_heads for head in rank_heads]
        results.append(_sum_heads(torch.cat(own, dim=2), flat, num_heads))
    return tuple(results)


def _count_tokens(context: SequenceContext) -> list[int]:
    """Return the tokens of each rank of this rank's Ulysses axis."""
    layout, size = context.layout, context.comm.mesh.ulysses.size
    first = layout.sp_rank // size * size
    return [layout.count(rank) for rank in range(first, first + size)]


def _select(x: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """Return heads of x [B, T, H, D] by number, zeros for -1."""
    if heads == tuple(range(heads[0], heads[0] + len(heads))) and heads[0] >= 0:
        return x[:, :, heads[0] : heads[0] + len(heads)]
    index = torch.tensor(heads, device=x.device)
    return x[:, :, index.clamp(min=0)].masked_fill((index < 0)[:, None], 0)


def _sum_heads(x: torch.Tensor, heads: list[int], num_heads: int) -> torch.Tensor:
    """Sum the heads of x [B, T, len(heads), D] that have the same number; drop those of -1."""
    kept = [i for i, head in enumerate(heads) if head >= 0]
    numbers = [heads[i] for i in kept]
    if numbers == list(range(num_heads)):
        return x[:, :, kept] if len(kept) < len(heads) else x
    total = x.new_zeros(
        *x.shape[:2], num_heads, x.shape[3], dtype=torch.promote_types(x.dtype, torch.float32)
    )
    total.index_add_(2, torch.tensor(numbers, device=x.device), x[:, :, kept].to(total.dtype))
    return total.to(x.dtype)


def _pad(num_heads: int, num_kv_heads: int, num_ranks: int) -> tuple[int, int]:
    """Return how many key heads and query heads of each to compute so that the ranks divide them.

    The key heads must divide the ranks, which then share them, or be divided by them.
    """
    group = num_heads // num_kv_heads
    divisor = next((n for n in range(num_kv_heads, num_ranks) if num_ranks % n == 0), None)
    multiple = math.ceil(num_kv_heads / num_ranks) * num_ranks
    choices = []
    for total in {multiple, divisor or multiple}:
        sharers = max(1, num_ranks // total)
        padded_group = math.ceil(group / sharers) * sharers
        sent = total * padded_group + max(num_ranks, total)
        choices.append((sent, total, padded_group))
    return min(choices)[1:]
