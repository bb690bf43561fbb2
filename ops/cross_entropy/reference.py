"""Definition: the logits of every token, in float32 at least."""

import torch
import torch.nn.functional as F


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Sum over tokens of logsumexp(logits) - logits[label]; hidden [N, E], labels [N]."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T
    return F.nll_loss(logits.log_softmax(-1), labels, reduction="sum")
