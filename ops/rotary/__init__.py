"""Rotary position embedding on halves of each head (arXiv:2104.09864)."""

import math

import torch

from conf.schema import RopeScaling
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
    position_ids: torch.Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, float32 [T, head_dim / 2], of position * theta^(-2 i / head_dim).

    Args:
        position_ids: int64 [T].
        scaling: of the frequencies; yarn scales cos and sin as well.
    """
    half = head_dim // 2
    exponent = torch.arange(half, device=position_ids.device, dtype=torch.float32) / half
    # Rounded as in Transformers: far into a text another last bit would turn heads visibly.
    frequency = 1 / theta**exponent
    if scaling is not None:
        kept = _kept(frequency, theta, scaling)
        frequency = (1 - kept) * frequency / scaling.factor + kept * frequency
    angle = position_ids[:, None].float() * frequency
    if scaling is None or scaling.kind != "yarn":
        return angle.cos(), angle.sin()
    length = scaling.attention_factor or 0.1 * math.log(max(scaling.factor, 1.0)) + 1
    return angle.cos() * length, angle.sin() * length


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


def _kept(frequency: torch.Tensor, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """Return how much of its frequency each channel keeps, from 0 (all of it slower) to 1."""
    if scaling.original_seq_len is None or scaling.slow is None or scaling.fast is None:
        return torch.zeros_like(frequency)
    if scaling.kind == "llama3":
        rotations = scaling.original_seq_len / (2 * math.pi / frequency)
        return ((rotations - scaling.slow) / (scaling.fast - scaling.slow)).clamp(0, 1)
    # Yarn's ramp is even over channels, between those with `fast` and with `slow` rotations.
    half = len(frequency)
    first, last = (
        half * math.log(scaling.original_seq_len / (2 * math.pi * n)) / math.log(theta)
        for n in (scaling.fast, scaling.slow)
    )
    first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * half - 1)
    channel = torch.arange(half, device=frequency.device, dtype=torch.float32)
    return 1 - ((channel - first) / max(last - first, 0.001)).clamp(0, 1)
