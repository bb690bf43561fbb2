"""The definition of the loss: all logits in float64, differentiable by autograd."""

import torch


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ops.cross_entropy.linear_cross_entropy` of hidden [N, E] by its definition."""
    valid = labels != ignore_index
    logits = hidden[valid].double() @ weight.double().mT
    lse = logits.logsumexp(dim=1)
    label_losses = lse - logits.gather(1, labels[valid, None]).squeeze(1)
    spread_losses = lse - logits.mean(dim=1)
    losses = (1 - label_smoothing) * label_losses + label_smoothing * spread_losses
    return (losses + z_loss * lse.square()).sum().float(), valid.sum()
