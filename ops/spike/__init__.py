"""Spiking activations: adaptive threshold, signed spike counts, their trains, products, statistics.

Eq. 19 and 21 to 23 of arXiv:2509.05276: V_th = mean(|x|) / k over the channels of a token and
s = round(x / V_th). A layer computes V_th (W s); the gradient skips the quantizer.
"""

import torch

from ops.registry import FLOATS, Implementation, choose
from ops.spike.coding import check_coding, check_num_steps, find_span, step_weights
from ops.spike.planes import check_operands, split_into_planes
from ops.spike.statistics import spike_statistics

__all__ = [
    "IMPLEMENTATIONS",
    "INTEGER_IMPLEMENTATIONS",
    "MAX_COUNT",
    "decode",
    "encode",
    "spike_count",
    "spike_histogram",
    "spike_matmul",
    "spike_statistics",
    "step_weights",
]

MIN_THRESHOLD, MAX_THRESHOLD = 1e-5, 1e4
MAX_COUNT = 255
"""Counts above this one are binned with it, unless a caller says otherwise."""
MOST_BINS = 65_536

_GPU_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)

IMPLEMENTATIONS = (
    Implementation(
        "cpp",
        "ops.spike.cpp_impl",
        ("cpu",),
        (torch.bfloat16, torch.float32),
        requires="ops.cpp_build:explain_no_avx512",
    ),
    Implementation(
        "triton",
        "ops.spike.triton_impl",
        ("cuda",),
        _GPU_FLOATS,
        requires="ops.triton_runtime:explain_absence",
        on_request=("cpu",),
    ),
    Implementation("torch", "ops.spike.torch_impl", None, FLOATS),
    Implementation("reference", "ops.spike.reference", None, FLOATS),
)
"""Of functions of activations."""

INTEGER_IMPLEMENTATIONS = (
    Implementation(
        "triton",
        "ops.spike.triton_impl",
        ("cuda",),
        (*_GPU_FLOATS, *_INTEGERS),
        requires="ops.triton_runtime:explain_absence",
        on_request=("cpu",),
    ),
    Implementation("torch", "ops.spike.torch_impl", None, (*FLOATS, *_INTEGERS)),
    Implementation("reference", "ops.spike.reference", None, (*FLOATS, *_INTEGERS)),
)
"""Of functions of integers, whatever dtype holds them."""


def spike_count(
    x: torch.Tensor, k: float = 3.0, *, impl: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the signed spike count of every channel and the threshold of every token.

    Args:
        x: [..., channels].
        k: thresholds are mean(|x|) / k, held within [1e-5, 1e4].
        impl: pin an implementation by name.

    Returns:
        count [..., channels], integers in the dtype of x, halves rounded to even; threshold
        [..., 1] float32 (float64 for float64 inputs), without gradient. The gradient of count
        passes straight through to x, divided by the threshold.

    Raises:
        ValueError: k is not positive, x has no channels or the pinned implementation cannot run.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; give [..., channels], at least one")
    if k <= 0:
        raise ValueError(f"k={k} must be above 0; the published value is 3.0")
    count, threshold = choose("spike.spike_count", IMPLEMENTATIONS, x, impl)(x, k)
    return count, threshold


def encode(
    count: torch.Tensor, coding: str, *, num_steps: int | None = None, impl: str | None = None
) -> torch.Tensor:
    """Return the spike train of integer counts, which `decode` turns back exactly.

    Args:
        count: integers below 2^62 in size, any shape and dtype.
        coding: "binary", {0, 1}, as many spikes as the count; "ternary", {-1, 0, 1}, the same with
            its sign; "bitwise", {0, 1}, the bits of the count, lowest first;
            "bitwise_bidirectional", {-1, 0, 1}, the bits of its size times its sign;
            "bitwise_twos_complement", {0, 1}, with the sign in the top bit.
        num_steps: steps of the train; None: as few as the largest count needs, at least one.
        impl: pin an implementation by name.

    Returns:
        train [num_steps, ...] int8.

    Raises:
        ValueError: counts that are no integers, negative ones in a coding without a sign, or more
            than num_steps can hold.
    """
    check_coding(coding)
    least, most = find_span(count)
    num_steps = check_num_steps(least, most, coding, num_steps)
    function = choose("spike.encode", INTEGER_IMPLEMENTATIONS, count, impl)
    train: torch.Tensor = function(count, coding, num_steps)
    return train


def decode(train: torch.Tensor, coding: str, *, impl: str | None = None) -> torch.Tensor:
    """Return the counts that a spike train stands for, sum_t c_t s_t (`step_weights`).

    Args:
        train: [num_steps, ...], as `encode` returns it.
        coding: that it was encoded in.
        impl: pin an implementation by name.

    Returns:
        count [...] int64.

    Raises:
        ValueError: an unknown coding, or a train that is longer than 63 bits or not integer.
    """
    weights = step_weights(coding, train.shape[0] if train.dim() else 0)
    function = choose("spike.decode", INTEGER_IMPLEMENTATIONS, train, impl)
    count: torch.Tensor = function(train, coding, weights.tolist())
    return count


def spike_histogram(
    count: torch.Tensor, max_count: int = MAX_COUNT, *, impl: str | None = None
) -> torch.Tensor:
    """Return how often each size |count| occurs, in one pass over the counts.

    Args:
        count: integers, any shape, as `spike_count` returns them; NaN is binned with 0.
        max_count: the last bin, which larger counts are binned with; 1 to 65,535.
        impl: pin an implementation by name.

    Returns:
        int64 [max_count + 1] on the device of count.

    Raises:
        ValueError: max_count is out of range.
    """
    if not 1 <= max_count < MOST_BINS:
        raise ValueError(f"max_count={max_count} must be within 1 and {MOST_BINS - 1}; use 255")
    table = IMPLEMENTATIONS if count.is_floating_point() else INTEGER_IMPLEMENTATIONS
    function = choose("spike.spike_histogram", table, count, impl)
    histogram: torch.Tensor = function(count.detach(), max_count)
    return histogram


def spike_matmul(
    count: torch.Tensor, weight: torch.Tensor, *, impl: str | None = None
) -> torch.Tensor:
    """Return `count @ weight.T` of integers, exactly, without gradient.

    Counts beyond int8 are split into digits of 8 bits, one product of int8 each.

    Args:
        count: [..., in], integers of any dtype, or a spike train.
        weight: [out, in] int8.
        impl: pin an implementation by name.

    Returns:
        [..., out] int32.

    Raises:
        ValueError: shapes or dtypes that do not fit, counts that are no integers, or so large that
            a sum may exceed int32.
    """
    span = check_operands(count, weight)
    function = choose("spike.spike_matmul", INTEGER_IMPLEMENTATIONS, count, impl)
    total: torch.Tensor | None = None
    for factor, plane in split_into_planes(count, *span):
        product = function(plane, weight)
        total = product if total is None else total.add_(product, alpha=factor)
    assert total is not None, "there is at least one plane"
    return total.reshape(*count.shape[:-1], len(weight))
