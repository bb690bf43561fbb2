"""The gated unit of SwiGLU (arXiv:2002.05202): silu(gate) * up."""

import torch

from ops.registry import FLOATS, Implementation, choose

IMPLEMENTATIONS = (
    Implementation(
        "cpp",
        "ops.swiglu.cpp_impl",
        ("cpu",),
        (torch.bfloat16,),
        requires="ops.cpp_build:explain_no_avx512",
    ),
    Implementation(
        "triton",
        "ops.swiglu.triton_impl",
        ("cuda",),
        (torch.float32, torch.bfloat16, torch.float16),
        requires="ops.triton_runtime:explain_absence",
        on_request=("cpu",),
    ),
    Implementation("torch", "ops.swiglu.torch_impl", None, FLOATS),
    Implementation("reference", "ops.swiglu.reference", None, FLOATS),
)


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """Return gate * sigmoid(gate) * up; the backward pass keeps gate and up alone.

    Args:
        gate: [..., I].
        up: shape and dtype of gate.
        impl: pin an implementation by name; None lets the registry choose.

    Returns:
        [..., I] in the dtype of gate.

    Raises:
        ValueError: gate and up differ or the pinned implementation cannot run.
    """
    if (up.shape, up.dtype) != (gate.shape, gate.dtype):
        raise ValueError(
            f"up {tuple(up.shape)} {up.dtype} must be as gate {tuple(gate.shape)} {gate.dtype}"
        )
    out: torch.Tensor = choose("swiglu.swiglu", IMPLEMENTATIONS, gate, impl)(gate, up)
    return out
