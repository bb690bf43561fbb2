"""Root-mean-square norm over the last dim (arXiv:1910.07467), with the residual add before it."""

from typing import overload

import torch

from ops.registry import FLOATS, Implementation, choose

IMPLEMENTATIONS = (
    Implementation(
        "cpp",
        "ops.rms_norm.cpp_impl",
        ("cpu",),
        (torch.bfloat16,),
        requires="ops.cpp_build:explain_no_avx512",
    ),
    Implementation(
        "triton",
        "ops.rms_norm.triton_impl",
        ("cuda",),
        (torch.float32, torch.bfloat16, torch.float16),
        requires="ops.triton_runtime:explain_absence",
        on_request=("cpu",),
    ),
    Implementation("torch", "ops.rms_norm.torch_impl", None, FLOATS),
    Implementation("reference", "ops.rms_norm.reference", None, FLOATS),
)


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: None = None,
    impl: str | None = None,
) -> torch.Tensor: ...


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return s / sqrt(mean(s^2) + eps) * weight for s = x, or for s = x + residual beside s.

    The sum is rounded to the dtype of x before it is normalised; statistics are float32 at least.
    Gradients flow through both results.

    Args:
        x: [..., E].
        weight: [E], usually float32.
        residual: shape and dtype of x.
        impl: pin an implementation by name; None lets the registry choose.

    Returns:
        The normalised tensor, [..., E] in the dtype of x; with `residual` (normalised, sum).

    Raises:
        ValueError: the sizes differ or the pinned implementation cannot run.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} must be [E] of x {tuple(x.shape)}")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual {tuple(residual.shape)} {residual.dtype} must be as x {tuple(x.shape)} "
            f"{x.dtype}"
        )
    function = choose("rms_norm.rms_norm", IMPLEMENTATIONS, x, impl)
    out, summed = function(x, weight, eps, residual)
    return out if residual is None else (out, summed)
