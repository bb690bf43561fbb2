"""Spikes in Triton: one program reads a row from memory once, and again from the cache."""

# Kernels have no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from ops.spike import MAX_THRESHOLD, MIN_THRESHOLD, torch_impl
from ops.spike.coding import UNARY
from ops.spike.straight_through import SpikeCount
from ops.triton_build import Build
from ops.triton_runtime import Blocks, find_blocks

MOST_BINS = 4096  # that fit beside each other in shared memory
PROGRAMS = 1024  # of a histogram
VECTOR = 16  # int8 of a load

SEARCH: dict[str, tuple[Blocks, ...]] = {
    "spike_count_fwd": tuple(
        {"BLOCK": block, "num_warps": warps, "num_stages": stages}
        for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 16))
        for stages in (1, 2)
    ),
    "spike_count_bwd": tuple(
        {"BLOCK": block, "num_warps": warps, "num_stages": stages}
        for block, warps in ((1024, 4), (2048, 4), (4096, 8))
        for stages in (1, 2)
    ),
    "encode": tuple(
        {"BLOCK": block, "num_warps": 4, "num_stages": 1} for block in (512, 1024, 2048)
    ),
    "decode": tuple(
        {"BLOCK": block, "num_warps": 4, "num_stages": 2} for block in (512, 1024, 2048)
    ),
    "histogram": tuple(
        {"BLOCK": block, "num_warps": warps, "num_stages": 1}
        for block, warps in ((1024, 4), (2048, 4), (4096, 8))
    ),
    "spike_matmul": tuple(
        {"ROWS": rows, "COLUMNS": columns, "INPUTS": 64, "num_warps": warps, "num_stages": stages}
        for rows, columns, warps in ((64, 64, 8), (128, 64, 4), (128, 128, 8))
        for stages in (2, 3)
    ),
}
"""Launch settings worth trying, by kernel."""


def spike_count(x: torch.Tensor, k: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.spike.spike_count`."""
    count, threshold = SpikeCount.apply(x, k, spike_count_fwd, spike_count_bwd)
    return count, threshold


def encode(count: torch.Tensor, coding: str, num_steps: int) -> torch.Tensor:
    """See `ops.spike.encode`."""
    count = count.contiguous()
    train = torch.empty(num_steps, *count.shape, dtype=torch.int8, device=count.device)
    size = count.numel()
    if size:
        blocks = find_blocks("spike", "encode", size, count.device)
        grid = (triton.cdiv(size, blocks["BLOCK"]),)
        _encode_kernel[grid](count, train, size, num_steps, **_coding_flags(coding), **blocks)
    return train


def decode(train: torch.Tensor, coding: str, weights: list[int]) -> torch.Tensor:
    """See `ops.spike.decode`; `weights` are those of the steps."""
    train = train.contiguous()
    count = torch.empty(train.shape[1:], dtype=torch.int64, device=train.device)
    size = count.numel()
    if size:
        blocks = find_blocks("spike", "decode", size, train.device)
        grid = (triton.cdiv(size, blocks["BLOCK"]),)
        negative = len(weights) - 1 if weights[-1] < 0 else len(weights)
        _decode_kernel[grid](
            train, count, size, len(weights), negative, UNARY=coding in UNARY, **blocks
        )
    return count


def spike_histogram(count: torch.Tensor, max_count: int) -> torch.Tensor:
    """See `ops.spike.spike_histogram`."""
    if max_count >= MOST_BINS:
        return torch_impl.spike_histogram(count, max_count)
    count = count.contiguous()
    histogram = torch.zeros(max_count + 1, dtype=torch.int64, device=count.device)
    if count.numel():
        blocks = find_blocks("spike", "histogram", count.numel(), count.device)
        programs = min(triton.cdiv(count.numel(), blocks["BLOCK"]), PROGRAMS)
        _histogram_kernel[programs,](
            count,
            histogram,
            count.numel(),
            max_count,
            BINS=triton.next_power_of_2(max_count + 1),
            **blocks,
        )
    return histogram


def spike_matmul(plane: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply int8 [rows, in] by int8 [out, in]."""
    (rows, inputs), columns = plane.shape, len(weight)
    if inputs % VECTOR:
        plane, weight = (F.pad(x, (0, -inputs % VECTOR)) for x in (plane, weight))
    plane, weight = plane.contiguous(), weight.contiguous()
    out = torch.empty(rows, columns, dtype=torch.int32, device=plane.device)
    if out.numel():
        blocks = find_blocks("spike", "spike_matmul", rows, plane.device)
        grid = (triton.cdiv(rows, blocks["ROWS"]), triton.cdiv(columns, blocks["COLUMNS"]))
        vectors = triton.cdiv(inputs, VECTOR)
        _spike_matmul_kernel[grid](plane, weight, out, rows, columns, vectors, **blocks)
    return out


def spike_count_fwd(x: torch.Tensor, k: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return count and threshold."""
    x = x.contiguous()
    count = torch.empty_like(x)
    threshold = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if x.numel():
        blocks = find_blocks("spike", "spike_count_fwd", x.shape[-1], x.device)
        grid = (threshold.numel(),)
        _spike_count_fwd_kernel[grid](x, count, threshold, k, x.shape[-1], **blocks)
    return count, threshold


def spike_count_bwd(dcount: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Return dx."""
    dcount = dcount.contiguous()
    dx = torch.empty_like(dcount)
    if dcount.numel():
        blocks = find_blocks("spike", "spike_count_bwd", dcount.shape[-1], dcount.device)
        grid = (threshold.numel(),)
        _spike_count_bwd_kernel[grid](dcount, threshold, dx, dcount.shape[-1], **blocks)
    return dx


def list_builds(arch: str) -> list[Build]:
    """Return every kernel that ships, for an architecture."""
    builds = []

    def add(kernel: Any, case: str, dtype: str, types: Any, size: int = 1, **flags: Any) -> None:
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        blocks = find_blocks("spike", name, size, arch)
        builds.append(Build(kernel, case, dtype, flags, blocks, types))

    for dtype in ("bf16", "fp16", "fp32"):
        types = {"p_threshold": "*fp32", "k": "fp32"}
        for size in (1024, 4096):
            add(_spike_count_fwd_kernel, f"{dtype}-E{size}", dtype, types, size)
            add(_spike_count_bwd_kernel, f"{dtype}-E{size}", dtype, types, size)
    for dtype in ("bf16", "fp16", "fp32", "i32"):
        for coding in ("ternary", "bitwise", "bitwise_twos_complement"):
            flags = _coding_flags(coding)
            add(_encode_kernel, f"{dtype}-{coding}", dtype, {"p_train": "*i8"}, **flags)
        add(_histogram_kernel, dtype, dtype, {"p_histogram": "*i64"}, BINS=256)
    for unary in (False, True):
        case = "unary" if unary else "bitwise"
        add(_decode_kernel, case, "i8", {"p_count": "*i64"}, UNARY=unary)
    for rows in (64, 128):
        add(_spike_matmul_kernel, f"i8-rows{rows}", "i8", {"p_out": "*i32"}, rows)
    return builds


def _coding_flags(coding: str) -> dict[str, bool]:
    # Counts of unsigned codings are never negative: their trains are those of the signed ones.
    return {"UNARY": coding in UNARY, "SIGNED": coding != "bitwise_twos_complement"}


_VECTOR = tl.constexpr(VECTOR)
_LEAST = tl.constexpr(MIN_THRESHOLD)
_MOST = tl.constexpr(MAX_THRESHOLD)
_WHOLE = tl.constexpr(2.0**23)  # from here on float32 has no fractions


@triton.jit
def _spike_count_fwd_kernel(p_x, p_count, p_threshold, k, channels, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p_x += row * channels
    p_count += row * channels
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, channels, BLOCK):
        i = start + tl.arange(0, BLOCK)
        b_sum += tl.abs(tl.load(p_x + i, mask=i < channels, other=0.0).to(tl.float32))
    mean = tl.div_rn(tl.div_rn(tl.sum(b_sum), channels * 1.0), k)
    # In this order NaN stays NaN.
    threshold = tl.where(mean < _LEAST, _LEAST, mean)
    threshold = tl.where(threshold > _MOST, _MOST, threshold)
    tl.store(p_threshold + row, threshold)
    for start in range(0, channels, BLOCK):
        i = start + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + i, mask=i < channels, other=0.0).to(tl.float32)
        b_ratio = tl.div_rn(b_x, tl.full([BLOCK], 1.0, tl.float32) * threshold)
        # Adding 2^23 leaves no room for fractions: the sum is rounded, halves to even.
        b_size = tl.abs(b_ratio)
        b_size = tl.where(b_size < _WHOLE, (b_size + _WHOLE) - _WHOLE, b_size)
        b_count = tl.where(b_ratio < 0, -b_size, b_size)
        tl.store(p_count + i, b_count.to(p_count.dtype.element_ty), mask=i < channels)


@triton.jit
def _spike_count_bwd_kernel(p_dcount, p_threshold, p_dx, channels, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    threshold = tl.load(p_threshold + row)
    for start in range(0, channels, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = row * channels + i
        b_dcount = tl.load(p_dcount + at, mask=i < channels, other=0.0).to(tl.float32)
        b_dx = tl.div_rn(b_dcount, tl.full([BLOCK], 1.0, tl.float32) * threshold)
        tl.store(p_dx + at, b_dx.to(p_dx.dtype.element_ty), mask=i < channels)


@triton.jit
def _load_integers(p, at, inside):
    b = tl.load(p + at, mask=inside, other=0)
    if b.dtype.is_floating():
        b = b.to(tl.float32)
    return b.to(tl.int64)


@triton.jit
def _encode_kernel(
    p_count,
    p_train,
    size,
    num_steps,
    UNARY: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    b_count = _load_integers(p_count, at, inside)
    b_sign = tl.where(b_count < 0, -1, 1)
    b_rest = tl.abs(b_count) if SIGNED else b_count
    for _ in range(num_steps):
        if UNARY:
            b_spike = tl.where(b_rest > 0, b_sign, 0)
            b_rest -= 1
        else:
            b_spike = (b_rest & 1).to(tl.int32)
            if SIGNED:
                b_spike *= b_sign
            b_rest >>= 1
        tl.store(p_train + at, b_spike.to(tl.int8), mask=inside)
        p_train += size


@triton.jit
def _decode_kernel(
    p_train, p_count, size, num_steps, negative, UNARY: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    b_count = tl.zeros([BLOCK], dtype=tl.int64)
    for t in range(num_steps):
        b_spike = _load_integers(p_train, at, inside)
        if not UNARY:
            b_spike = tl.where(t == negative, -b_spike, b_spike) << t
        b_count += b_spike
        p_train += size
    tl.store(p_count + at, b_count, mask=inside)


@triton.jit
def _histogram_kernel(
    p_count, p_histogram, size, max_count, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    b_sums = tl.zeros([BINS], dtype=tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(first, size, step):
        at = start + tl.arange(0, BLOCK)
        b_count = tl.load(p_count + at, mask=at < size, other=0)
        b_size = tl.abs(b_count.to(tl.float32))
        b_size = tl.where(b_size == b_size, b_size, 0.0)  # NaN is binned with 0
        b_bin = tl.minimum(b_size, max_count * 1.0).to(tl.int32)
        b_sums += tl.histogram(b_bin, BINS, mask=at < size)
    i = tl.arange(0, BINS)
    tl.atomic_add(p_histogram + i, b_sums.to(tl.int64), mask=i <= max_count, sem="relaxed")


@triton.jit
def _spike_matmul_kernel(
    p_plane,
    p_weight,
    p_out,
    rows,
    columns,
    vectors,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    inputs = vectors * _VECTOR  # which tells the compiler that rows are aligned
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    first_column = tl.program_id(1).to(tl.int64) * COLUMNS
    p_plane += first_row * inputs
    p_weight += first_column * inputs
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_rows, in_columns = row < rows - first_row, column < columns - first_column
    b_out = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    for start in range(0, inputs, INPUTS):
        i = start + tl.arange(0, INPUTS)
        left = in_rows[:, None] & (i < inputs)[None, :]
        right = in_columns[None, :] & (i < inputs)[:, None]
        b_plane = tl.load(p_plane + row[:, None] * inputs + i[None, :], mask=left, other=0)
        b_weight = tl.load(p_weight + column[None, :] * inputs + i[:, None], mask=right, other=0)
        b_out = tl.dot(b_plane, b_weight, b_out, out_dtype=tl.int32)
    inside = in_rows[:, None] & in_columns[None, :]
    p_out += first_row * columns + first_column
    tl.store(p_out + row[:, None] * columns + column[None, :], b_out, mask=inside)
