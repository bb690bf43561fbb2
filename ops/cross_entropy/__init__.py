"""Cross entropy of a linear head that never holds all logits."""

import torch

from ops.registry import FLOATS, Implementation, choose

IMPLEMENTATIONS = (
    Implementation("torch", "ops.cross_entropy.torch_impl:linear_cross_entropy", None, FLOATS),
    Implementation("reference", "ops.cross_entropy.reference:linear_cross_entropy", None, FLOATS),
)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross entropy of softmax(hidden weight^T) and the labels that count.

    Args:
        hidden: [..., E].
        weight: [V, E], same dtype.
        labels: int64 [...], 0..V-1 or `ignore_index`.
        impl: "reference" | "torch"; None lets the registry choose.

    Returns:
        loss_sum in nats (float32, float64 for float64 inputs) and num_valid (int64).

    Raises:
        ValueError: shapes do not fit or the pinned implementation cannot run.
    """
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels "
            f"{tuple(labels.shape)} must be [..., E], [V, E] and [...]"
        )
    function = choose("cross_entropy", IMPLEMENTATIONS, hidden, impl)
    rows = labels.flatten() != ignore_index
    loss_sum = function(hidden.flatten(0, -2)[rows], weight, labels.flatten()[rows])
    return loss_sum, rows.sum()
