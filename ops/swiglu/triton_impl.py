"""The gated unit in one kernel each way; the backward pass computes the sigmoid again.

With s = sigmoid(g):   dg = dy u s (1 + g (1 - s)),   du = dy g s.
"""

import torch
import triton
import triton.language as tl

from ops.swiglu.autograd import SwiGLU
from ops.triton_build import Build
from ops.triton_runtime import Blocks, find_blocks


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `ops.swiglu.swiglu`."""
    out: torch.Tensor = SwiGLU.apply(gate, up, swiglu_fwd, swiglu_bwd)
    return out


def swiglu_fwd(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return the gated unit."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    blocks = find_blocks("swiglu", "swiglu_fwd", gate.shape[-1], gate.device)
    grid = (triton.cdiv(out.numel(), blocks["BLOCK"]),)
    _swiglu_fwd_kernel[grid](gate, up, out, out.numel(), **blocks)
    return out


def swiglu_bwd(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up."""
    dout, gate, up = dout.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    blocks = find_blocks("swiglu", "swiglu_bwd", gate.shape[-1], gate.device)
    grid = (triton.cdiv(dgate.numel(), blocks["BLOCK"]),)
    _swiglu_bwd_kernel[grid](dout, gate, up, dgate, dup, dgate.numel(), **blocks)
    return dgate, dup


SEARCH: dict[str, tuple[Blocks, ...]] = {
    kernel: tuple(
        {"BLOCK": block, "num_warps": warps, "num_stages": 1}
        for block in (512, 1024, 2048, 4096)
        for warps in (4, 8)
    )
    for kernel in ("swiglu_fwd", "swiglu_bwd")
}


def list_builds(arch: str) -> list[Build]:
    """Return the kernels that ship."""
    return [
        Build(kernel, dtype, dtype, {}, find_blocks("swiglu", name, 1, arch))
        for dtype in ("bf16", "fp16", "fp32")
        for kernel, name in ((_swiglu_fwd_kernel, "swiglu_fwd"), (_swiglu_bwd_kernel, "swiglu_bwd"))
    ]


@triton.jit
def _swiglu_fwd_kernel(p_gate, p_up, p_out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    b_gate = tl.load(p_gate + at, mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + at, mask, other=0.0).to(tl.float32)
    b_out = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), mask)


@triton.jit
def _swiglu_bwd_kernel(  # type: ignore[no-untyped-def]
    p_dout, p_gate, p_up, p_dgate, p_dup, size, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    b_dout = tl.load(p_dout + at, mask, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + at, mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + at, mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(b_gate)
    b_dgate = b_dout * b_up * share * (1.0 + b_gate * (1.0 - share))
    b_dup = b_dout * b_gate * share
    tl.store(p_dgate + at, b_dgate.to(p_dgate.dtype.element_ty), mask)
    tl.store(p_dup + at, b_dup.to(p_dup.dtype.element_ty), mask)
