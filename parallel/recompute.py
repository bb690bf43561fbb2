"""Activation recomputation: run a part again in the backward pass instead of keeping its inside."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def run_recomputed(
    function: Callable[..., torch.Tensor], x: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """Return function(x, *rest), keeping only `x` for the backward pass (arXiv:1604.06174)."""
    out = checkpoint(function, x, *rest, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(out, torch.Tensor)
    return out
