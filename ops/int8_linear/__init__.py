"""Products of integer activations with INT8 weights: exact sums, then scales (W8A-spike).

Activations are spike counts, or any integers that a token's threshold scales. Weights have one
symmetric scale per row or per group of input channels. Sums of integer products are exact; floating
point begins with their scales.
"""

import torch

from ops.registry import FLOATS, Implementation, choose

_COUNTS = (*FLOATS, torch.int8, torch.int16, torch.int32, torch.int64)

IMPLEMENTATIONS = (
    # CPUs with tiles of bfloat16 have those of int8, too.
    Implementation(
        "cpp",
        "ops.int8_linear.cpp_impl",
        ("cpu",),
        (torch.bfloat16, torch.float32),
        requires="ops.cpp_build:explain_no_amx",
    ),
    Implementation(
        "triton",
        "ops.int8_linear.triton_impl",
        ("cuda",),
        (torch.float32, torch.bfloat16, torch.float16),
        requires="ops.triton_runtime:explain_absence",
        on_request=("cpu",),
    ),
    Implementation("torch", "ops.int8_linear.torch_impl", None, _COUNTS),
    Implementation("reference", "ops.int8_linear.reference", None, _COUNTS),
)
"""By the dtype that holds the counts."""

MAX_WEIGHT = 127
"""-128 is left out, so that a weight and its negative are equally exact."""
LIMIT = 2**22
"""Counts are below this in size: three digits of 8 bits hold them."""


def int8_linear(
    count: torch.Tensor,
    threshold: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    group_size: int | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Return `threshold * sum over groups g of scale[:, g] * (count[g] @ weight[:, g].T)`.

    The sum in parentheses is exact: counts are split into digits of 8 bits, digit d of which sums
    to at most 127 * 128 * in < 2^31 for up to 132,000 inputs, and digits are put together in int64.
    It is then rounded to float32 once.

    Args:
        count: [..., in], integers below 2^22 in size, float32, bfloat16 or any integer dtype.
        threshold: [..., 1] float32.
        weight: [out, in] int8.
        scale: [out, groups] float32, one column per group of `group_size` inputs, the last of which
            may be smaller.
        group_size: None: all inputs are one group.
        impl: pin an implementation by name.

    Returns:
        [..., out] float32.

    Raises:
        ValueError: shapes or dtypes that do not fit, or counts that are too large or not finite.
    """
    size = weight.shape[-1]
    groups = 1 if group_size is None else -(-size // group_size)
    if weight.dtype != torch.int8 or weight.dim() != 2 or count.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"count has shape {list(count.shape)}, weight is {weight.dtype} {list(weight.shape)}; "
            "give [..., in] and int8 [out, in]"
        )
    if scale.shape != (len(weight), groups) or scale.dtype != torch.float32:
        raise ValueError(
            f"scale is {scale.dtype} {list(scale.shape)}; give float32 {[len(weight), groups]}"
        )
    if threshold.shape != (*count.shape[:-1], 1) or threshold.dtype != torch.float32:
        raise ValueError(
            f"threshold is {threshold.dtype} {list(threshold.shape)}; give float32 "
            f"{[*count.shape[:-1], 1]}"
        )
    function = choose("int8_linear.int8_linear", IMPLEMENTATIONS, count, impl)
    rows = count.reshape(-1, size)
    out: torch.Tensor = function(
        rows, threshold.reshape(-1, 1), weight, scale, size if group_size is None else group_size
    )
    return out.view(*count.shape[:-1], len(weight))
