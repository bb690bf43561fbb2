"""The definitions of routing, sorting and grouped products in float64, for autograd."""

import torch


def route(logits: torch.Tensor, k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.moe.route`."""
    experts = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    wide = logits.double()
    # Over their sum, the chosen probabilities are the softmax of the chosen logits alone.
    weights = (
        wide.gather(1, experts).softmax(1) if normalize else wide.softmax(1).gather(1, experts)
    )
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
