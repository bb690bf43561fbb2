"""The definition of the loss: all logits in float64, differentiable by autograd."""

import torch


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ops.cross_entropy.linear_cross_entropy` of hidden [N, E] by its definition."""
    valid = labels != ignore_index
    logits = hidden[valid].double() @ weight.double().mT
    label_logits = logits.gather(1, labels[valid, None]).squeeze(1)
    loss_sum = (logits.logsumexp(dim=1) - label_logits).sum()
    return loss_sum.float(), valid.sum()
