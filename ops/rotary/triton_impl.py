"""Rotary embedding in one kernel; the backward pass turns the other way."""

import torch
import triton
import triton.language as tl

from ops.rotary.autograd import Rotary
from ops.triton_build import Build
from ops.triton_runtime import Blocks, find_blocks


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `ops.rotary.rotary`."""
    out: torch.Tensor = Rotary.apply(x, cos, sin, _turn)
    return out


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float) -> torch.Tensor:
    x = x.contiguous()
    B, T, H, D = x.shape
    out = torch.empty_like(x)
    blocks = find_blocks("rotary", "rotary", D, x.device)
    grid = (triton.cdiv(B * T * H, blocks["BLOCK_R"]),)
    tensors = x, cos.float().contiguous(), sin.float().contiguous(), out
    constants = {"HALF": D // 2, "WIDTH": triton.next_power_of_2(D // 2)}
    _rotary_kernel[grid](*tensors, B * T * H, T, H, direction, **constants, **blocks)
    return out


SEARCH: dict[str, tuple[Blocks, ...]] = {
    "rotary": tuple(
        {"BLOCK_R": rows, "num_warps": warps, "num_stages": 1}
        for rows in (8, 16, 32, 64)
        for warps in (2, 4, 8)
    )
}


def list_builds(arch: str) -> list[Build]:
    """Return the kernels that ship, for the usual head dims."""
    types = {"p_cos": "*fp32", "p_sin": "*fp32", "direction": "fp32"}
    return [
        Build(
            _rotary_kernel,
            f"{dtype}-D{size}",
            dtype,
            {"HALF": size // 2, "WIDTH": size // 2},
            find_blocks("rotary", "rotary", size, arch),
            types,
        )
        for dtype in ("bf16", "fp16", "fp32")
        for size in (32, 64, 128, 256)
    ]


@triton.jit
def _rotary_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_cos,
    p_sin,
    p_out,
    num_rows,
    num_tokens,
    num_heads,
    direction,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    pairs = tl.arange(0, WIDTH)[None, :]
    mask = (rows < num_rows) & (pairs < HALF)
    angles = rows // num_heads % num_tokens * HALF + pairs
    b_cos = tl.load(p_cos + angles, mask, other=0.0)
    b_sin = tl.load(p_sin + angles, mask, other=0.0) * direction
    at = rows * (2 * HALF) + pairs
    b_a = tl.load(p_x + at, mask, other=0.0).to(tl.float32)
    b_b = tl.load(p_x + at + HALF, mask, other=0.0).to(tl.float32)
    dtype = p_out.dtype.element_ty
    tl.store(p_out + at, (b_a * b_cos - b_b * b_sin).to(dtype), mask)
    tl.store(p_out + at + HALF, (b_b * b_cos + b_a * b_sin).to(dtype), mask)
