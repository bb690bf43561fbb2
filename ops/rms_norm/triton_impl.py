"""Root-mean-square norm, with the residual add before it, in one kernel each way.

A program takes BLOCK_R rows; rows wider than BLOCK_E are read twice. The weight's gradient is
summed over the rows of each of at most `MAX_PROGRAMS` programs first, then over the programs.
"""

import torch
import triton
import triton.language as tl

from ops.rms_norm.autograd import apply_rms_norm
from ops.triton_build import Build
from ops.triton_runtime import Blocks, find_blocks

MAX_PROGRAMS = 512


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `ops.rms_norm.rms_norm`."""
    return apply_rms_norm(x, weight, eps, residual, rms_norm_fwd, rms_norm_bwd)


def rms_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the normalised tensor, what was normalised, and 1 / rms [rows] of its rows."""
    x, size = x.contiguous(), x.shape[-1]
    residual = None if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    summed = None if residual is None else torch.empty_like(x)
    rstd = x.new_empty(x.numel() // size, dtype=torch.float32)
    blocks = find_blocks("rms_norm", "rms_norm_fwd", size, x.device)
    grid = (triton.cdiv(len(rstd), blocks["BLOCK_R"]),)
    tensors = x, residual, weight.float(), out, summed, rstd
    _rms_norm_fwd_kernel[grid](*tensors, len(rstd), eps, SIZE=size, **blocks)
    return out, x if summed is None else summed, rstd


def rms_norm_bwd(
    dout: torch.Tensor,
    dsummed: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x, to which `dsummed` is added, and of the weight.

    Args:
        x: what was normalised, contiguous.
        rstd: float32 [rows].
    """
    size = x.shape[-1]
    dx = torch.empty_like(x)
    blocks = find_blocks("rms_norm", "rms_norm_bwd", size, x.device)
    programs = min(triton.cdiv(len(rstd), blocks["BLOCK_R"]), MAX_PROGRAMS)
    partial = rstd.new_empty(programs, size)
    dsummed = None if dsummed is None else dsummed.contiguous()
    tensors = dout.contiguous(), dsummed, x, weight.float(), rstd, dx, partial
    _rms_norm_bwd_kernel[(programs,)](*tensors, len(rstd), SIZE=size, **blocks)
    return dx, partial.sum(0).to(weight.dtype)


SEARCH: dict[str, tuple[Blocks, ...]] = {
    kernel: tuple(
        {"BLOCK_R": rows, "BLOCK_E": size, "num_warps": warps, "num_stages": 1}
        for rows, size in ((32, 64), (16, 128), (4, 1024), (1, 1024), (1, 4096), (1, 8192))
        for warps in (4, 8, 16)
    )
    for kernel in ("rms_norm_fwd", "rms_norm_bwd")
}


def list_builds(arch: str) -> list[Build]:
    """Return the kernels that ship: heads without, hidden states with and without a residual."""
    builds = []
    for dtype in ("bf16", "fp16", "fp32"):
        for size, adds in ((64, 0), (128, 0), (2048, 1), (3584, 1), (8192, 1), (32768, 1)):
            case = f"{dtype}-E{size}" + "-residual" * adds
            types = {"p_weight": "*fp32", "p_rstd": "*fp32", "p_partial": "*fp32", "eps": "fp32"}
            for kernel, name, optional in (
                (_rms_norm_fwd_kernel, "rms_norm_fwd", ("p_residual", "p_summed")),
                (_rms_norm_bwd_kernel, "rms_norm_bwd", ("p_dsummed",)),
            ):
                blocks = find_blocks("rms_norm", name, size, arch)
                constants = {"SIZE": size} | ({} if adds else dict.fromkeys(optional))
                builds.append(Build(kernel, case, dtype, constants, blocks, types))
    return builds


@triton.jit
def _load_sum(p_x, p_residual, offsets, mask):  # type: ignore[no-untyped-def]
    b_x = tl.load(p_x + offsets, mask, other=0.0).to(tl.float32)
    if p_residual is not None:
        b_x += tl.load(p_residual + offsets, mask, other=0.0).to(tl.float32)
    return b_x.to(p_x.dtype.element_ty).to(tl.float32)


@triton.jit
def _rms_norm_fwd_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_residual,
    p_weight,
    p_out,
    p_summed,
    p_rstd,
    num_rows,
    eps,
    SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    WHOLE: tl.constexpr = SIZE <= BLOCK_E  # the row stays in registers
    b_x = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_R, 1], tl.float32)
    for start in range(0, SIZE, BLOCK_E):
        columns = start + tl.arange(0, BLOCK_E)[None, :]
        mask = (rows < num_rows) & (columns < SIZE)
        b_x = _load_sum(p_x, p_residual, rows * SIZE + columns, mask)
        if p_summed is not None:
            tl.store(p_summed + rows * SIZE + columns, b_x.to(p_summed.dtype.element_ty), mask)
        total += tl.sum(b_x * b_x, 1, keep_dims=True)
    rstd = tl.rsqrt(total / SIZE + eps)
    tl.store(p_rstd + rows, rstd, rows < num_rows)
    for start in range(0, SIZE, BLOCK_E):
        columns = start + tl.arange(0, BLOCK_E)[None, :]
        mask = (rows < num_rows) & (columns < SIZE)
        if not WHOLE:
            b_x = _load_sum(p_x, p_residual, rows * SIZE + columns, mask)
        b_weight = tl.load(p_weight + columns, columns < SIZE, other=0.0)
        b_out = b_x * rstd * b_weight
        tl.store(p_out + rows * SIZE + columns, b_out.to(p_out.dtype.element_ty), mask)


@triton.jit
def _rms_norm_bwd_kernel(  # type: ignore[no-untyped-def]
    p_dout,
    p_dsummed,
    p_x,
    p_weight,
    p_rstd,
    p_dx,
    p_partial,
    num_rows,
    SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    first, step = tl.program_id(0) * BLOCK_R, tl.num_programs(0) * BLOCK_R
    WHOLE: tl.constexpr = SIZE <= BLOCK_E  # the row stays in registers
    b_dweight = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for top in range(first, num_rows, step):
        rows = (top + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
        rstd = tl.load(p_rstd + rows, rows < num_rows, other=0.0)
        b_x = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
        b_dy = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
        total = tl.zeros([BLOCK_R, 1], tl.float32)
        for start in range(0, SIZE, BLOCK_E):
            columns = start + tl.arange(0, BLOCK_E)[None, :]
            mask = (rows < num_rows) & (columns < SIZE)
            b_x = tl.load(p_x + rows * SIZE + columns, mask, other=0.0).to(tl.float32)
            b_dy = tl.load(p_dout + rows * SIZE + columns, mask, other=0.0).to(tl.float32)
            if WHOLE:
                b_dweight += b_x * rstd * b_dy
            b_dy *= tl.load(p_weight + columns, columns < SIZE, other=0.0)
            total += tl.sum(b_x * b_dy, 1, keep_dims=True)
        mean = total / SIZE * rstd * rstd
        for start in range(0, SIZE, BLOCK_E):
            columns = start + tl.arange(0, BLOCK_E)[None, :]
            mask = (rows < num_rows) & (columns < SIZE)
            if not WHOLE:
                b_x = tl.load(p_x + rows * SIZE + columns, mask, other=0.0).to(tl.float32)
                b_dy = tl.load(p_dout + rows * SIZE + columns, mask, other=0.0).to(tl.float32)
                b_dy *= tl.load(p_weight + columns, columns < SIZE, other=0.0)
            b_dx = (b_dy - b_x * mean) * rstd
            if p_dsummed is not None:
                b_dx += tl.load(p_dsummed + rows * SIZE + columns, mask, other=0.0).to(tl.float32)
            tl.store(p_dx + rows * SIZE + columns, b_dx.to(p_dx.dtype.element_ty), mask)
    for start in range(0, SIZE, BLOCK_E):
        columns = start + tl.arange(0, BLOCK_E)[None, :]
        if not WHOLE:
            b_dweight = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
            for top in range(first, num_rows, step):
                rows = (top + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
                mask = (rows < num_rows) & (columns < SIZE)
                rstd = tl.load(p_rstd + rows, rows < num_rows, other=0.0)
                b_x = tl.load(p_x + rows * SIZE + columns, mask, other=0.0).to(tl.float32)
                b_dout = tl.load(p_dout + rows * SIZE + columns, mask, other=0.0).to(tl.float32)
                b_dweight += b_x * rstd * b_dout
        b_sum = tl.sum(b_dweight, 0)[None, :]
        p_row = p_partial + tl.program_id(0).to(tl.int64) * SIZE
        tl.store(p_row + columns, b_sum, columns < SIZE)
