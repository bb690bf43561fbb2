"""Rotary position embedding on halves of each head (arXiv:2104.09864)."""

import torch

from ops.registry import FLOATS, Implementation, choose

IMPLEMENTATIONS = (
    Implementation(
        "cpp",
        "ops.rotary.cpp_impl",
        ("cpu",),
        (torch.bfloat16,),
        requires="ops.cpp_build:explain_no_avx512",
    ),
    Implementation(
        "triton",
        "ops.rotary.triton_impl",
        ("cuda",),
        (torch.float32, torch.bfloat16, torch.float16),
        requires="ops.triton_runtime:explain_absence",
        on_request=("cpu",),
    ),
    Implementation("torch", "ops.rotary.torch_impl", None, FLOATS),
    Implementation("reference", "ops.rotary.reference", None, FLOATS),
)


def rotary_table(
    position_ids: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, float32 [T, head_dim / 2], of position * theta^(-2 i / head_dim).

    Args:
        position_ids: int64 [T].
    """
    half = head_dim // 2
    exponent = torch.arange(half, device=position_ids.device, dtype=torch.float32) / half
    angle = position_ids[:, None].float() * theta**-exponent
    return angle.cos(), angle.sin()


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, impl: str | None = None
) -> torch.Tensor:
    """Rotate channel i and i + D / 2 of each head by the angle of its token.

    Args:
        x: [B, T, H, D], D even.
        cos, sin: [T, D / 2], see `rotary_table`.
        impl: pin an implementation by name; None lets the registry choose.

    Returns:
        [B, T, H, D] in the dtype of x.

    Raises:
        ValueError: the table does not fit or the pinned implementation cannot run.
    """
    if cos.shape != (x.shape[1], x.shape[3] // 2) or sin.shape != cos.shape or x.shape[3] % 2:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be [T, D / 2] of x "
            f"{tuple(x.shape)} with an even D"
        )
    out: torch.Tensor = choose("rotary.rotary", IMPLEMENTATIONS, x, impl)(x, cos, sin)
    return out
