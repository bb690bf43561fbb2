"""Chunked over tokens, with the gradients computed in the forward pass.

d loss / d logits = softmax(logits) - onehot(label), so a chunk's logits are turned into their
gradient in place and used at once; the backward pass only scales by the incoming gradient.
"""

from typing import Any

import torch

CHUNK_ELEMENTS = 2**26
"""Logits held at a time."""


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """See `ops.cross_entropy.linear_cross_entropy`; hidden [N, E], all labels count."""
    loss: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, labels)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, labels):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=wide, device=hidden.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = None
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            h, label = hidden[chunk], labels[chunk, None]
            logits = (h @ weight.T).to(wide)
            lse = logits.logsumexp(-1, keepdim=True)
            loss_sum += (lse - logits.gather(1, label)).sum()
            if not (need_hidden or need_weight):
                continue
            dlogits = logits.sub_(lse).exp_()
            dlogits.scatter_add_(1, label, -torch.ones_like(lse))
            dlogits = dlogits.to(hidden.dtype)
            if dhidden is not None:
                dhidden[chunk] = dlogits @ weight
            if need_weight:
                part = dlogits.T @ h
                if dweight is None:
                    dweight = part.to(wide) if start + rows < hidden.shape[0] else part
                else:
                    dweight += part
        if need_weight and dweight is None:
            dweight = torch.zeros_like(weight)
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return loss_sum

    @staticmethod
    def backward(ctx: Any, dloss):  # type: ignore[no-untyped-def]
        dhidden, dweight = ctx.saved_tensors
        if dhidden is not None:
            dhidden = dhidden * dloss  # a scalar: the product is rounded once
        if dweight is not None:
            dweight = (dweight * dloss).to(ctx.dtype)
        return dhidden, dweight, None
