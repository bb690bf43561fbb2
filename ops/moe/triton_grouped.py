"""Products of groups of rows with a matrix each, in Triton.

A table made on the device says for each tile of rows which group it is of and where it starts and
ends. As many tiles are launched as there can be; those that are too many find nothing to do.
"""

import torch
import triton
import triton.language as tl

from ops.moe.autograd import GroupedMatmul, Products
from ops.triton_build import Build
from ops.triton_runtime import Blocks, dot_dtype, find_blocks


def _candidates(*rows: tuple[int, int, int, int, int]) -> tuple[Blocks, ...]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return tuple(dict(zip(names, row, strict=True)) for row in rows)


_HALF = _candidates(
    (64, 64, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (128, 128, 32, 4, 4),
    (128, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 2),
    (128, 128, 32, 8, 2),
)
_FP32 = _candidates((32, 32, 32, 4, 2), (64, 32, 16, 4, 2), (64, 64, 16, 4, 2), (64, 64, 32, 8, 2))
SEARCH: dict[str, tuple[Blocks, ...]] = {
    "grouped_matmul": _HALF,
    "grouped_matmul_fp32": _FP32,
    "grouped_matmul_bwd": _HALF,
    "grouped_matmul_bwd_fp32": _FP32,
}


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """See `ops.moe.grouped_matmul`."""
    products = Products(grouped_matmul_fwd, grouped_matmul_dx, grouped_matmul_dweight)
    out: torch.Tensor = GroupedMatmul.apply(x.contiguous(), weight.contiguous(), counts, products)
    return out


def list_grouped_builds(arch: str) -> list[Build]:
    """Return the kernels of this file in every combination that ships."""
    builds = []
    # Sizes are constants, since aligned rows need half the registers: here those of an expert of
    # SpikingBrain-76B.
    for dtype, dot in (("bf16", tl.bfloat16), ("fp16", tl.float16), ("fp32", tl.float32)):
        suffix = "_fp32" if dtype == "fp32" else ""
        blocks = find_blocks("moe", "grouped_matmul" + suffix, 4096, arch)
        for is_transposed in (True, False):
            sizes = {"OUTER": 3584, "INNER": 18944}
            constants = {"IS_TRANSPOSED": is_transposed, "DOT": dot, **sizes}
            case = f"{dtype}-{'fwd' if is_transposed else 'dgrad'}"
            types = {"p_tiles": "*i64"}
            builds.append(Build(_grouped_matmul_fwd_kernel, case, dtype, constants, blocks, types))
        blocks = find_blocks("moe", "grouped_matmul_bwd" + suffix, 4096, arch)
        types = {"p_ends": "*i64"}
        constants = {"DOT": dot, "OUT_SIZE": 3584, "IN_SIZE": 18944}
        builds.append(Build(_grouped_matmul_bwd_kernel, dtype, dtype, constants, blocks, types))
    return builds


def grouped_matmul_fwd(
    x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, is_transposed: bool = True
) -> torch.Tensor:
    """Return x weight[g]^T, or x weight[g] for the gradient of x: [M, F] or [M, E]."""
    inner, outer = x.shape[1], weight.shape[1 if is_transposed else 2]
    out = x.new_empty(len(x), outer)
    blocks = find_blocks("moe", _name("grouped_matmul", x), outer, x.device)
    tiles = _list_tiles(counts, len(x), blocks["BLOCK_M"])
    grid = (tiles.shape[1] * triton.cdiv(outer, blocks["BLOCK_N"]),)
    _grouped_matmul_fwd_kernel[grid](
        x,
        weight,
        out,
        tiles,
        tiles.shape[1],
        OUTER=outer,
        INNER=inner,
        IS_TRANSPOSED=is_transposed,
        DOT=dot_dtype(x),
        **blocks,
    )
    return out


def grouped_matmul_dx(
    dout: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Return dx [M, E]."""
    return grouped_matmul_fwd(dout, weight, counts, is_transposed=False)


def grouped_matmul_dweight(
    dout: torch.Tensor, x: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Return dweight [G, F, E]."""
    dweight = x.new_empty(len(counts), dout.shape[1], x.shape[1])
    blocks = find_blocks("moe", _name("grouped_matmul_bwd", x), x.shape[1], x.device)
    num_blocks = triton.cdiv(dout.shape[1], blocks["BLOCK_M"])
    grid = (triton.cdiv(x.shape[1], blocks["BLOCK_N"]), num_blocks, len(counts))
    _grouped_matmul_bwd_kernel[grid](
        dout,
        x,
        dweight,
        counts.cumsum(0),
        OUT_SIZE=dout.shape[1],
        IN_SIZE=x.shape[1],
        DOT=dot_dtype(x),
        **blocks,
    )
    return dweight


def _name(kernel: str, x: torch.Tensor) -> str:
    return f"{kernel}_fp32" if x.dtype == torch.float32 else kernel


def _list_tiles(counts: torch.Tensor, num_rows: int, block: int) -> torch.Tensor:
    """Return group, first row and end of each tile of rows, int64 [3, tiles].

    There are as many tiles as `num_rows` can need at most; tiles that are not used are empty.
    """
    num_groups = len(counts)
    tiles = (counts + (block - 1)) // block
    tile_ends, row_ends = tiles.cumsum(0), counts.cumsum(0)
    limit = (num_rows + num_groups * (block - 1)) // block
    index = torch.arange(limit, device=counts.device)
    group = torch.searchsorted(tile_ends, index, right=True)
    is_used = group < num_groups
    group = group.clamp(max=num_groups - 1)
    first = (row_ends - counts)[group] + (index - (tile_ends - tiles)[group]) * block
    return torch.stack([group, first, torch.where(is_used, row_ends[group], 0)])


@triton.jit
def _grouped_matmul_fwd_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_weight,
    p_out,
    p_tiles,
    num_tiles,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Neighboring programs share rows and columns, so that both come from the cache.
    NUM_COLS: tl.constexpr = tl.cdiv(OUTER, BLOCK_N)
    pid = tl.program_id(0)
    tile, col = tl.swizzle2d(pid // NUM_COLS, pid % NUM_COLS, num_tiles, NUM_COLS, 8)
    group = tl.load(p_tiles + tile)
    first = tl.load(p_tiles + num_tiles + tile)
    end = tl.load(p_tiles + 2 * num_tiles + tile)
    if first >= end:
        return
    # Scalars take the large offsets; those inside a tile fit into 32 bits.
    rows = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    b_row_mask = rows < (end - first).to(tl.int32)
    b_col_mask = cols < OUTER - col * BLOCK_N
    p_x += first * INNER
    p_weight += group * OUTER * INNER + col.to(tl.int64) * BLOCK_N * (INNER if IS_TRANSPOSED else 1)
    b_out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, INNER, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        b_x_mask = b_row_mask & (k[None, :] < INNER)
        b_x = tl.load(p_x + rows * INNER + k[None, :], mask=b_x_mask, other=0.0).to(DOT)
        if IS_TRANSPOSED:
            p_block = p_weight + cols * INNER + k[:, None]
        else:
            p_block = p_weight + k[:, None] * OUTER + cols
        b_weight = tl.load(p_block, mask=b_col_mask & (k[:, None] < INNER), other=0.0).to(DOT)
        b_out = tl.dot(b_x, b_weight, b_out, input_precision="ieee")
    p_out += first * OUTER + col * BLOCK_N
    b_out = b_out.to(p_out.dtype.element_ty)
    tl.store(p_out + rows * OUTER + cols, b_out, mask=b_row_mask & b_col_mask)


@triton.jit
def _grouped_matmul_bwd_kernel(  # type: ignore[no-untyped-def]
    p_dout,
    p_x,
    p_dweight,
    p_ends,
    OUT_SIZE: tl.constexpr,
    IN_SIZE: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group = tl.program_id(2)
    outs = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    ins = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    first = tl.load(p_ends + group - 1, mask=group > 0, other=0)
    num_rows = (tl.load(p_ends + group) - first).to(tl.int32)
    p_dout += first * OUT_SIZE
    p_x += first * IN_SIZE
    b_dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    rows = tl.arange(0, BLOCK_K)
    for start in range(0, num_rows, BLOCK_K):
        b_mask = rows < num_rows - start
        b_dout_mask = (outs < OUT_SIZE) & b_mask[None, :]
        p_block = p_dout + rows[None, :] * OUT_SIZE + outs
        b_dout = tl.load(p_block, mask=b_dout_mask, other=0.0).to(DOT)
        b_x_mask = b_mask[:, None] & (ins < IN_SIZE)
        b_x = tl.load(p_x + rows[:, None] * IN_SIZE + ins, mask=b_x_mask, other=0.0).to(DOT)
        b_dweight = tl.dot(b_dout, b_x, b_dweight, input_precision="ieee")
        p_dout += BLOCK_K * OUT_SIZE
        p_x += BLOCK_K * IN_SIZE
    p_dweight += group.to(tl.int64) * OUT_SIZE * IN_SIZE
    b_dweight = b_dweight.to(p_dweight.dtype.element_ty)
    b_mask = (outs < OUT_SIZE) & (ins < IN_SIZE)
    tl.store(p_dweight + outs * IN_SIZE + ins, b_dweight, mask=b_mask)
