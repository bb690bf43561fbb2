"""Cross entropy of a linear head by chunks of tokens; gradients come with the forward pass.

A chunk of logits becomes its softmax p and then its gradient, p minus one at the label, in place.
The loss -log p[label] is read off p: PyTorch's softmax has float32 statistics inside and costs
less than a maximum, a difference, an exponential and a sum one after the other.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Few large chunks: every further one costs a pass over the float32 gradient of the weight.
CHUNK_BYTES = 1 << 28
SOFTMAX_ROWS = 64  # few: the copy back in place comes from the cache


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ops.cross_entropy.linear_cross_entropy` of hidden [N, E].

    Tokens that do not count cost nothing. The gradients of hidden and weight exist after the
    forward pass; the backward pass scales them in place, so it can run once.
    """
    valid = labels != ignore_index
    loss_sum = _LinearCrossEntropy.apply(
        hidden[valid], weight, labels[valid], torch.is_grad_enabled()
    )
    return loss_sum, valid.sum()


def linear_cross_entropy_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
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
    for start in range(0, num_tokens, chunk):
        rows = slice(start, min(start + chunk, num_tokens))
        logits = torch.mm(hidden[rows], weight.mT, out=buffer[: rows.stop - start])
        for block in logits.split(SOFTMAX_ROWS):
            block.copy_(block.softmax(dim=1))
        loss_sum += _sum_losses(logits, hidden[rows], weight, labels[rows], sum_dtype)
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden[rows])
        if needs_dweight:
            part = torch.mm(logits.mT, hidden[rows])
            dweight = part if dweight is None else dweight.to(sum_dtype).add_(part)
    if needs_dweight:
        dweight = torch.zeros_like(weight) if dweight is None else dweight.to(weight.dtype)
    return loss_sum.float(), dhidden, dweight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, with_grad: bool
    ) -> torch.Tensor:
        needs = [with_grad and needed for needed in ctx.needs_input_grad[:2]]
        loss_sum, *ctx.grads = linear_cross_entropy_fwd(hidden, weight, labels, *needs)
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
        return *(None if grad is None else grad.mul_(dloss_sum) for grad in grads), None, None


def _choose_chunk(hidden: torch.Tensor, weight: torch.Tensor) -> int:
    """Return tokens per chunk, all chunks about equal."""
    num_tokens = max(1, hidden.shape[0])
    limit = max(1, CHUNK_BYTES // (weight.shape[0] * hidden.itemsize))
    num_chunks = -(-num_tokens // limit)
    return -(-num_tokens // num_chunks)


def _sum_losses(
    probs: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the sum of -log probs[label] and turn probs [N, V] into the gradient of the logits.

    Of a likely label 1 - p is exact as the sum of the other probabilities, of an unlikely one p
    itself; where p is too small for its dtype, the label is compared with the likeliest token.
    """
    at_label = (torch.arange(len(labels), device=labels.device), labels)
    label_probs = probs[at_label].to(dtype)
    probs[at_label] = 0.0
    others = probs.sum(dim=1).to(dtype)
    probs[at_label] = -others.to(probs.dtype)
    losses = torch.where(others < 0.5, -torch.log1p(-others), -label_probs.log())
    lost = (label_probs < torch.finfo(probs.dtype).tiny).nonzero().squeeze(1)
    if len(lost):
        top_probs, top = probs[lost].max(dim=1)
        margin = (hidden[lost].to(dtype) * (weight[top].to(dtype) - weight[labels[lost]])).sum(1)
        losses[lost] = margin - top_probs.to(dtype).log()
    return losses.sum()
