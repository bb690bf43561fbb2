"""Cross entropy of a linear head by chunks of tokens; gradients come with the forward pass.

With m the largest logit of a token, e = exp(logits - m), s = sum(e) and y one-hot at the label:
loss = log s + m - logit[label] and d logits = (e - s y) / s. A chunk of logits becomes e and then
e - s y in place; the division by s is made on hidden and its gradient, which are far smaller.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Few large chunks: every further one costs a pass over the float32 gradient of the weight.
CHUNK_BYTES = 1 << 28


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
        total, losses = _softmax_in_place(logits, labels[rows], sum_dtype)
        loss_sum += losses.sum()
        if dhidden is not None:
            dhidden[rows] = torch.mm(logits, weight) / total
        if needs_dweight:
            part = torch.mm(logits.mT, (hidden[rows] / total).to(hidden.dtype))
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


def _softmax_in_place(
    logits: torch.Tensor, labels: torch.Tensor, sum_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn logits [N, V] into e - s y; return s [N, 1] and the losses [N]."""
    logits -= logits.amax(dim=1, keepdim=True)
    label_logits = logits.gather(1, labels[:, None])
    logits.exp_()
    total = _sum_rows(logits, sum_dtype)
    losses = total.log() - label_logits
    label_exps = logits.gather(1, labels[:, None])
    logits.scatter_(1, labels[:, None], (label_exps - total).to(logits.dtype))
    return total, losses.squeeze(1)


def _sum_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the row sums of x [N, V] in dtype, [N, 1].

    A sum with a wider dtype would copy x. In 16 bits two plain sums, which round only their
    results, give the sum and, with its negative in place of the first column, what it lacks.
    """
    total = x.sum(dim=1, keepdim=True)
    if x.dtype == dtype:
        return total
    first = x[:, :1].clone()
    x[:, :1] = -total
    lack = x.sum(dim=1, keepdim=True)
    x[:, :1] = first
    return total.to(dtype) + lack.to(dtype) + first.to(dtype)
