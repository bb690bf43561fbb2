"""Spiking activations: adaptive threshold, signed spike counts and their statistics.

Eq. 19 and 21 of arXiv:2509.05276: V_th = mean(|x|) / k over the channels of a token and
s = round(x / V_th). A layer computes V_th (W s); the gradient skips the quantiser.
"""

import torch

from ops.registry import FLOATS, Implementation, choose

MIN_THRESHOLD, MAX_THRESHOLD = 1e-5, 1e4

IMPLEMENTATIONS = (
    Implementation("torch", "ops.spike.torch_impl", None, FLOATS),
    Implementation("reference", "ops.spike.reference", None, FLOATS),
)


def spike_count(
    x: torch.Tensor, k: float = 3.0, *, impl: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the signed spike count of every channel and the threshold of every token.

    Args:
        x: [..., channels].
        k: thresholds are mean(|x|) / k, held within [1e-5, 1e4].
        impl: "reference" | "torch"; None lets the registry choose.

    Returns:
        count [..., channels], integers in the dtype of x; threshold [..., 1] float32 (float64 for
        float64 inputs), without gradient. The gradient of count passes straight through to x,
        divided by the threshold.

    Raises:
        ValueError: k is not positive or the pinned implementation cannot run.
    """
    if k <= 0:
        raise ValueError(f"k={k} must be above 0; the published value is 3.0")
    count, threshold = choose("spike.spike_count", IMPLEMENTATIONS, x, impl)(x, k)
    return count, threshold
