"""The definitions of routing, sorting and grouped products in float64, for autograd."""

import torch
from torch.nn.functional import logsigmoid


def route(
    logits: torch.Tensor, k: int, normalize: bool, score: str, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.moe.route`."""
    wide = logits.double()
    scores = wide.softmax(1) if score == "softmax" else wide.sigmoid()
    # Logits order as their scores do, also where those are equal only because they are rounded.
    keys = wide if bias is None else scores + bias
    experts = keys.sort(dim=1, descending=True, stable=True).indices[:, :k]
    # Over their sum, scores are the softmax of their logarithms, and logits are those of a softmax.
    logs = wide if score == "softmax" else logsigmoid(wide)
    weights = logs.gather(1, experts).softmax(1) if normalize else scores.gather(1, experts)
    return weights.to(torch.promote_types(logits.dtype, torch.float32)), experts


def permute(
    x: torch.Tensor, experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.moe.permute`."""
    order = experts.flatten().argsort(stable=True)
    counts = experts.flatten().bincount(minlength=num_experts)
    return x.double()[order // experts.shape[1]].to(x.dtype), order, counts


def unpermute(y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """See `ops.moe.unpermute`."""
    weighted = weights.double().flatten()[order, None] * y.double()
    out = weighted.new_zeros(weights.shape[0], y.shape[1])
    return out.index_add(0, order // weights.shape[1], weighted).to(y.dtype)


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """See `ops.moe.grouped_matmul`."""
    groups = x.double().split(counts.tolist())
    products = [rows @ matrix.mT for rows, matrix in zip(groups, weight.double(), strict=True)]
    return torch.cat(products).to(x.dtype)
