"""Cross entropy of a linear head, without holding the logits of all tokens."""

import torch

from ops.registry import FLOATS, Implementation, choose

IMPLEMENTATIONS = (
    Implementation("torch", "ops.cross_entropy.torch_impl", None, FLOATS),
    Implementation("reference", "ops.cross_entropy.reference", None, FLOATS),
)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over tokens `logsumexp(hidden weight^T) - (hidden weight^T)[label]`.

    Args:
        hidden: hidden states [B, T, E] or [N, E].
        weight: head [V, E] of hidden's dtype.
        labels: int64 [B, T] or [N], each below V, or ignore_index for a token that does not count.
        ignore_index: the label of tokens that do not count.
        impl: pin an implementation by name.

    Returns:
        loss_sum, a float32 scalar in nats, and num_valid, the int64 count of tokens in it.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if hidden.dim() not in (2, 3) or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}, weight {list(weight.shape)}; give "
            "[tokens, size] or [batch, tokens, size] and [vocabulary, size]"
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)}; give int64 {list(hidden.shape[:-1])}"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight is {weight.dtype}, hidden {hidden.dtype}; convert one of them")
    function = choose("cross_entropy.linear_cross_entropy", IMPLEMENTATIONS, hidden, impl)
    loss_sum, num_valid = function(
        hidden.flatten(0, -2), weight, labels.flatten(), ignore_index=ignore_index
    )
    return loss_sum, num_valid
