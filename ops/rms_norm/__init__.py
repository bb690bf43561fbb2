"""Root-mean-square norm over the last dim (arXiv:1910.07467)."""

import torch

from ops.registry import FLOATS, Implementation, choose

IMPLEMENTATIONS = (
    Implementation("torch", "ops.rms_norm.torch_impl", None, FLOATS),
    Implementation("reference", "ops.rms_norm.reference", None, FLOATS),
)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, impl: str | None = None
) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight; statistics in float32 at least.

    Args:
        x: [..., E].
        weight: [E], usually float32.
        impl: "reference" | "torch"; None lets the registry choose.

    Returns:
        [..., E] in the dtype of x.

    Raises:
        ValueError: the sizes differ or the pinned implementation cannot run.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} must be [E] of x {tuple(x.shape)}")
    out: torch.Tensor = choose("rms_norm.rms_norm", IMPLEMENTATIONS, x, impl)(x, weight, eps)
    return out
