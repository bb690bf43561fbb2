"""The loop over chunks of tokens that implementations share; gradients come with the forward pass.

A chunk of logits is made by a matrix product and turned into its loss and, in place, its gradient;
two more products make those of hidden and weight.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Few large chunks: every further one costs a pass over the float32 gradient of the weight.
CHUNK_BYTES = 1 << 28


Turn = Callable[[torch.Tensor, slice, bool], torch.Tensor]
"""(logits [C, V], which tokens they are of, needs_grad) -> loss_sum of these tokens; writes the
gradient of the logits over them if needs_grad, else may leave anything there."""


def sum_losses(hidden: torch.Tensor, weight: torch.Tensor, turn: Turn) -> torch.Tensor:
    """Return loss_sum of hidden [N, E], differentiable once in hidden and weight."""
    needs_grad = torch.is_grad_enabled()
    loss_sum: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, turn, needs_grad)
    return loss_sum


def linear_cross_entropy_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    turn: Turn,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return loss_sum (float32) and its gradients for hidden [N, E] and weight [V, E]."""
    sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss_sum = torch.zeros((), dtype=sum_dtype, device=hidden.device)
    dhidden = torch.empty_like(hidden) if needs_dhidden else None
    dweight: torch.Tensor | None = None
    num_tokens, chunk = hidden.shape[0], _choose_chunk(hidden, weight)
    buffer = hidden.new_empty(chunk, weight.shape[0])
    needs_grad = needs_dhidden or needs_dweight
    for start in range(0, num_tokens, chunk):
        rows = slice(start, min(start + chunk, num_tokens))
        logits = torch.mm(hidden[rows], weight.mT, out=buffer[: rows.stop - start])
        loss_sum += turn(logits, rows, needs_grad)
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden[rows])
        if needs_dweight:
            # Transposed [E, V]: on CPUs twice as fast as logits.mT times hidden.
            part = torch.mm(hidden[rows].mT.contiguous(), logits)
            dweight = part if dweight is None else dweight.to(sum_dtype).add_(part)
    if needs_dweight:
        dweight = weight.new_zeros(weight.mT.shape) if dweight is None else dweight
        dweight = dweight.to(weight.dtype).mT.contiguous()
    return loss_sum.float(), dhidden, dweight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        turn: Turn,
        needs_grad: bool,
    ) -> torch.Tensor:
        needs = [needs_grad and needed for needed in ctx.needs_input_grad[:2]]
        loss_sum, *ctx.grads = linear_cross_entropy_fwd(hidden, weight, turn, *needs)
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_sum: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError(
                "linear_cross_entropy was differentiated twice, but its gradients are scaled in "
                "place; call it again instead of backward(retain_graph=True)"
            )
        scaled = (None if grad is None else grad.mul_(dloss_sum) for grad in grads)
        return *scaled, None, None


def _choose_chunk(hidden: torch.Tensor, weight: torch.Tensor) -> int:
    """Return tokens per chunk, all chunks about equal."""
    num_tokens = max(1, hidden.shape[0])
    limit = max(1, CHUNK_BYTES // (weight.shape[0] * hidden.itemsize))
    num_chunks = -(-num_tokens // limit)
    return -(-num_tokens // num_chunks)
