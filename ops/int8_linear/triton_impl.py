"""INT8 products in Triton: a program adds up the products of all digits of the counts."""

# Kernels have no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from ops.int8_linear import torch_impl
from ops.spike.planes import split_into_planes
from ops.triton_build import Build
from ops.triton_runtime import Blocks, find_blocks

VECTOR = 16  # int8 of a load

SEARCH: dict[str, tuple[Blocks, ...]] = {
    "int8_linear": tuple(
        {"ROWS": rows, "COLUMNS": columns, "INPUTS": 64, "num_warps": warps, "num_stages": stages}
        for rows, columns, warps in ((16, 64, 4), (64, 64, 4), (128, 64, 8))
        for stages in (2, 3)
    ),
}
"""Launch settings worth trying, by kernel."""


def int8_linear(
    count: torch.Tensor,
    threshold: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """See `ops.int8_linear.int8_linear`."""
    (rows, inputs), (columns, groups) = count.shape, scale.shape
    if groups == 1:
        group_size = inputs + -inputs % VECTOR
    elif group_size % VECTOR:
        return torch_impl.int8_linear(count, threshold, weight, scale, group_size)
    least, most = torch_impl.find_range(count)
    planes = torch.stack([plane for _, plane in split_into_planes(count, least, most)])
    if inputs % VECTOR:
        planes, weight = (F.pad(x, (0, -inputs % VECTOR)) for x in (planes, weight))
    out = torch.empty(rows, columns, device=count.device)
    if out.numel():
        blocks = find_blocks("int8_linear", "int8_linear", rows, count.device)
        grid = (triton.cdiv(rows, blocks["ROWS"]), triton.cdiv(columns, blocks["COLUMNS"]))
        _int8_linear_kernel[grid](
            planes,
            threshold.contiguous(),
            weight.contiguous(),
            scale.contiguous(),
            out,
            rows,
            columns,
            planes.shape[2] // VECTOR,
            groups,
            group_size // VECTOR,
            DIGITS=len(planes),
            **blocks,
        )
    return out


def list_builds(arch: str) -> list[Build]:
    """Return every kernel that ships, for an architecture."""
    types = dict.fromkeys(("p_threshold", "p_scale", "p_out"), "*fp32")
    return [
        Build(
            _int8_linear_kernel,
            f"i8-digits{digits}-rows{rows}",
            "i8",
            {"DIGITS": digits},
            find_blocks("int8_linear", "int8_linear", rows, arch),
            types,
        )
        for digits in (1, 2, 3)
        for rows in (16, 128)
    ]


_VECTOR = tl.constexpr(VECTOR)


@triton.jit
def _int8_linear_kernel(
    p_plane,
    p_threshold,
    p_weight,
    p_scale,
    p_out,
    rows,
    columns,
    vectors,
    groups,
    group_vectors,
    DIGITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    inputs = vectors * _VECTOR  # which tells the compiler that rows are aligned
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    first_column = tl.program_id(1).to(tl.int64) * COLUMNS
    size = rows.to(tl.int64) * inputs  # of a plane
    p_plane += first_row * inputs
    p_weight += first_column * inputs
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_rows, in_columns = row < rows - first_row, column < columns - first_column
    b_out = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for group in range(groups):
        b_0 = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
        b_1, b_2 = b_0, b_0
        stop = tl.minimum(vectors, (group + 1) * group_vectors) * _VECTOR
        for start in range(group * group_vectors * _VECTOR, stop, INPUTS):
            i = start + tl.arange(0, INPUTS)
            left = in_rows[:, None] & (i < stop)[None, :]
            right = in_columns[None, :] & (i < stop)[:, None]
            p_here = p_plane + row[:, None] * inputs + i[None, :]
            b_weight = tl.load(p_weight + column[None, :] * inputs + i[:, None], right, 0)
            b_0 = tl.dot(tl.load(p_here, left, 0), b_weight, b_0, out_dtype=tl.int32)
            if DIGITS > 1:
                b_plane = tl.load(p_here + size, left, 0)
                b_1 = tl.dot(b_plane, b_weight, b_1, out_dtype=tl.int32)
            if DIGITS > 2:
                b_plane = tl.load(p_here + 2 * size, left, 0)
                b_2 = tl.dot(b_plane, b_weight, b_2, out_dtype=tl.int32)
        if DIGITS == 1:
            b_sum = b_0.to(tl.float32)
        else:
            # In int64, so that the sum is rounded once.
            b_wide = b_0.to(tl.int64) + (b_1.to(tl.int64) << 8)
            if DIGITS > 2:
                b_wide += b_2.to(tl.int64) << 16
            b_sum = b_wide.to(tl.float32)
        p_here = p_scale + (first_column + column) * groups + group
        b_out += b_sum * tl.load(p_here, mask=in_columns, other=0.0)[None, :]
    b_threshold = tl.load(p_threshold + first_row + row, mask=in_rows, other=0.0)
    inside = in_rows[:, None] & in_columns[None, :]
    p_out += first_row * columns + first_column
    tl.store(p_out + row[:, None] * columns + column[None, :], b_out * b_threshold[:, None], inside)
