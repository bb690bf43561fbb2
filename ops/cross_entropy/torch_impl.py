"""Cross entropy of a linear head in PyTorch for any device.

A block of logits becomes its softmax p and then its gradient, p minus one at the label, in place.
The loss -log p[label] is read off p: PyTorch's softmax has float32 statistics inside and costs
less than a maximum, a difference, an exponential and a sum one after the other.
"""

from functools import partial

import torch

from ops.cross_entropy.chunks import sum_losses

BLOCK_ROWS = 64  # few: what follows the softmax finds it in the cache


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ops.cross_entropy.linear_cross_entropy` of hidden [N, E].

    Tokens that do not count cost nothing.
    """
    valid = labels != ignore_index
    hidden, labels = hidden[valid], labels[valid]
    turn = partial(_turn, hidden, weight, labels, label_smoothing, z_loss)
    return sum_losses(hidden, weight, turn), valid.sum()


def _turn(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float,
    z_loss: float,
    logits: torch.Tensor,
    chunk: slice,
    needs_grad: bool,
) -> torch.Tensor:
    """See `ops.cross_entropy.chunks.Turn`."""
    hidden, labels = hidden[chunk], labels[chunk]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss_sum = torch.zeros((), dtype=dtype, device=hidden.device)
    mean_weight = weight.mean(dim=0, dtype=dtype) if label_smoothing else None
    for start in range(0, len(labels), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        block, label = logits[rows], labels[rows, None]
        block.copy_(block.softmax(dim=1))
        label_prob = block.gather(1, label).to(dtype)
        others = block.scatter_(1, label, 0.0).sum(dim=1, keepdim=True).to(dtype)
        losses = _read_losses(block, label_prob, others, hidden[rows], weight, labels[rows])
        dlabel = -others
        if label_smoothing or z_loss:
            wide = hidden[rows].to(dtype)
            label_logits = (wide * weight[labels[rows]]).sum(dim=1, keepdim=True)
            lse = losses + label_logits
            losses = losses + z_loss * lse.square()
            excess = 2 * z_loss * lse
            if z_loss:  # times 1 + excess; the sum would lose most of excess in bfloat16
                block.addcmul_(block, excess.to(block.dtype))
            dlabel += excess * label_prob
            if mean_weight is not None:
                # lse less the mean logit is the loss plus the logit of the label less that mean.
                losses += label_smoothing * (label_logits - (wide @ mean_weight)[:, None])
                share = label_smoothing / weight.shape[0]
                block.sub_(share)
                dlabel += label_smoothing - share
        block.scatter_(1, label, dlabel.to(block.dtype))
        loss_sum += losses.sum()
    return loss_sum


def _read_losses(
    probs: torch.Tensor,
    label_prob: torch.Tensor,
    others: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Return -log of label_prob [C, 1], given the probs [C, V] of other tokens and their sum.

    Of a likely label 1 - p is exact as the sum of the other probabilities, of an unlikely one p
    itself; where p is too small for its dtype, the label is compared with the likeliest token.
    """
    losses = torch.where(others < 0.5, -torch.log1p(-others), -label_prob.log())
    lost = (label_prob < torch.finfo(probs.dtype).tiny).squeeze(1).nonzero().squeeze(1)
    if len(lost):
        top_probs, top = probs[lost].max(dim=1, keepdim=True)
        difference = weight[top.squeeze(1)].to(losses.dtype) - weight[labels[lost]]
        margin = (hidden[lost].to(losses.dtype) * difference).sum(dim=1, keepdim=True)
        losses[lost] = margin - top_probs.to(losses.dtype).log()
    return losses
