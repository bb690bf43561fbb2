"""Distillation in PyTorch for any device: two blocks of logits become a loss and, in place of the
student's, its gradient.
"""

from functools import partial

import torch

from ops.cross_entropy.chunks import sum_losses

BLOCK_ROWS = 16  # few: a block is float32 and passed over several times


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
    """Compute `ops.cross_entropy.linear_distillation` of hidden [N, E].

    Tokens that do not count cost nothing.
    """
    valid = labels != ignore_index
    hidden, teacher_hidden, labels = hidden[valid], teacher_hidden[valid], labels[valid]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    parts = torch.zeros(2, dtype=dtype, device=hidden.device)
    teacher = teacher_hidden.detach(), teacher_weight.detach()
    turn = partial(_turn, *teacher, labels, share, temperature, parts)
    loss_sum = sum_losses(hidden, weight, turn)
    cross_entropy_sum, kl_sum = parts.float()
    return loss_sum, cross_entropy_sum, kl_sum, valid.sum()


def _turn(
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor,
    share: float,
    temperature: float,
    parts: torch.Tensor,
    logits: torch.Tensor,
    chunk: slice,
    needs_grad: bool,
) -> torch.Tensor:
    """See `ops.cross_entropy.chunks.Turn`; adds cross entropy and divergence to `parts`."""
    labels = labels[chunk]
    teacher_logits = teacher_hidden[chunk] @ teacher_weight.mT
    sums = torch.zeros_like(parts)
    for start in range(0, len(labels), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        block, label = logits[rows].to(parts.dtype), labels[rows, None]
        log_q = block.log_softmax(1)
        sums[0] -= log_q.gather(1, label).sum()
        log_p = teacher_logits[rows].to(parts.dtype).div_(temperature).log_softmax(1)
        soft_log_q = log_q if temperature == 1 else (block / temperature).log_softmax(1)
        p = log_p.exp()
        sums[1] += (p * log_p.sub_(soft_log_q)).sum()
        if needs_grad:
            # Of T^2 KL: the logits were divided by T once.
            gradient = soft_log_q.exp().sub_(p).mul_(share * temperature)
            hard = log_q.exp_()
            hard.scatter_add_(1, label, hard.new_full(label.shape, -1.0))
            logits[rows] = gradient.add_(hard, alpha=1 - share)
    parts += sums
    return (1 - share) * sums[0] + share * temperature**2 * sums[1]
