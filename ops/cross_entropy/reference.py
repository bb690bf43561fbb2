"""The definition of the losses: all logits in float64, differentiable by autograd."""

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


def linear_distillation(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    share: float,
    temperature: float,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `ops.cross_entropy.linear_distillation` of hidden [N, E] by its definition."""
    valid = labels != ignore_index
    logits = hidden[valid].double() @ weight.double().mT
    teacher_logits = (teacher_hidden[valid].double() @ teacher_weight.double().mT).detach()
    cross_entropy = -logits.log_softmax(1).gather(1, labels[valid, None]).sum()
    log_p = (teacher_logits / temperature).log_softmax(1)
    kl = (log_p.exp() * (log_p - (logits / temperature).log_softmax(1))).sum()
    loss = (1 - share) * cross_entropy + share * temperature**2 * kl
    return loss.float(), cross_entropy.detach().float(), kl.detach().float(), valid.sum()
