"""Short convolution in Triton, over the tokens of all documents at once.

The backward pass takes two kernels. The first computes the sum again, turns the gradient of the
output into that of the sum, and reduces the gradients of weight and bias over its tokens; the
second sends the gradient of the sum back to the inputs and to the states. Position 0 is a
document's first token, its state has positions -(K - 1) to -1.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ops.short_conv import MAX_KERNEL_SIZE
from ops.triton_build import Build
from ops.triton_runtime import Blocks, find_blocks


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    bounds: list[int],
    silu: bool,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `ops.short_conv.short_conv`; tensors as in `reference`."""
    starts = torch.tensor(bounds, dtype=torch.int32, device=x.device)
    out, final_state = _ShortConv.apply(x, weight, bias, state, starts, silu, output_final_state)
    return out, final_state


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, state, starts, silu, output_final_state):  # type: ignore[no-untyped-def]
        x = x.contiguous()
        state = None if state is None else state.transpose(1, 2).contiguous()
        tokens = torch.arange(len(x), device=x.device, dtype=torch.int32)
        docs = torch.searchsorted(starts[1:], tokens, right=True, out_int32=True)
        ctx.save_for_backward(x, weight, bias, state, starts, docs)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        out = short_conv_fwd(x, weight, bias, state, starts, docs, silu)
        if not output_final_state:
            return out, None
        return out, _find_final_state(x, state, starts, weight.shape[1]).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, dout, dfinal_state):  # type: ignore[no-untyped-def]
        x, weight, bias, state, starts, docs = ctx.saved_tensors
        dout = torch.zeros_like(x) if dout is None else dout
        dfinal_state = None if dfinal_state is None else dfinal_state.transpose(1, 2)
        dx, dweight, dbias, dstate = short_conv_bwd(
            dout, dfinal_state, x, weight, bias, state, starts, docs, ctx.silu
        )
        dstate = None if dstate is None else dstate.transpose(1, 2)
        return dx, dweight, dbias, dstate, None, None, None


def short_conv_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    starts: torch.Tensor,
    docs: torch.Tensor,
    silu: bool,
) -> torch.Tensor:
    """Return the output.

    Args:
        x: [tokens, C], contiguous.
        weight: [C, K].
        bias: [C].
        state: [N, K - 1, C], contiguous.
        starts: int32 [N + 1], where documents begin and end.
        docs: int32 [tokens], the document of each token.
    """
    C, K = weight.shape
    out = torch.empty_like(x)
    blocks = find_blocks("short_conv", "short_conv_fwd", C, x.device)
    grid = (triton.cdiv(len(x), blocks["BLOCK_T"]), triton.cdiv(C, blocks["BLOCK_C"]))
    tensors = x, *_widen(weight, bias), state, starts, docs, out
    _short_conv_fwd_kernel[grid](*tensors, len(x), C=C, K=K, SILU=silu, **blocks)
    return out


def short_conv_bwd(
    dout: torch.Tensor,
    dfinal_state: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    starts: torch.Tensor,
    docs: torch.Tensor,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of x, weight, bias and state; tensors as in `short_conv_fwd`."""
    C, K = weight.shape
    dout = dout.contiguous()
    dsum = torch.empty_like(x) if silu else dout
    blocks = find_blocks("short_conv", "short_conv_bwd_weight", C, x.device)
    grid = (triton.cdiv(len(x), blocks["BLOCK_T"]), triton.cdiv(C, blocks["BLOCK_C"]))
    partial = starts.new_empty(grid[0], K + 1, C, dtype=torch.float32)
    wide, wide_bias = _widen(weight, bias)
    tensors = dout, x, wide, wide_bias, state, starts, docs, dsum, partial
    _short_conv_bwd_weight_kernel[grid](*tensors, len(x), C=C, K=K, SILU=silu, **blocks)
    summed = partial.sum(0)
    dweight = summed[:K].t().to(weight.dtype)
    dbias = None if bias is None else summed[K].to(bias.dtype)

    dx = torch.empty_like(x)
    dstate = None if state is None else torch.empty_like(state)
    dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
    blocks = find_blocks("short_conv", "short_conv_bwd_input", C, x.device)
    rows = len(x) + (0 if state is None else len(state) * (K - 1))
    grid = (triton.cdiv(rows, blocks["BLOCK_T"]), triton.cdiv(C, blocks["BLOCK_C"]))
    _short_conv_bwd_input_kernel[grid](
        dsum, dfinal_state, wide, starts, docs, dx, dstate, len(x), rows, C=C, K=K, **blocks
    )
    return dx, dweight, dbias, dstate


def _widen(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weight as [K, C] and the bias, float32."""
    return weight.t().float().contiguous(), None if bias is None else bias.float().contiguous()


def _find_final_state(
    x: torch.Tensor, state: torch.Tensor | None, starts: torch.Tensor, K: int
) -> torch.Tensor:
    """Return the last K - 1 inputs of each document, [N, K - 1, C]."""
    length = (starts[1:] - starts[:-1])[:, None]
    position = length + torch.arange(1 - K, 0, device=x.device)  # [N, K - 1]
    inputs = x[(starts[:-1, None] + position).clamp(0, len(x) - 1)]
    if state is None:
        earlier = torch.zeros_like(inputs)
    else:
        at = (position + K - 1).clamp(max=K - 2)[..., None].expand_as(state)
        earlier = state.gather(1, at)
    return torch.where(position[..., None] >= 0, inputs, earlier)


SEARCH: dict[str, tuple[Blocks, ...]] = {
    kernel: tuple(
        {"BLOCK_T": tokens, "BLOCK_C": channels, "num_warps": warps, "num_stages": 1}
        for tokens, channels in ((16, 128), (32, 64), (64, 32), (64, 64), (128, 32))
        for warps in (4, 8)
    )
    for kernel in ("short_conv_fwd", "short_conv_bwd_weight", "short_conv_bwd_input")
}


def list_builds(arch: str) -> list[Build]:
    """Return the kernels for the usual 4 taps, bare and with everything, and the largest of all."""
    types = {"p_starts": "*i32", "p_docs": "*i32", "p_partial": "*fp32"}
    types |= {"p_weight": "*fp32", "p_bias": "*fp32"}
    kernels = (
        (_short_conv_fwd_kernel, "short_conv_fwd", ("p_bias", "p_state")),
        (_short_conv_bwd_weight_kernel, "short_conv_bwd_weight", ("p_bias", "p_state")),
        (_short_conv_bwd_input_kernel, "short_conv_bwd_input", ("p_dfinal", "p_dstate")),
    )
    cases = [(dtype, 4, full) for dtype in ("bf16", "fp16", "fp32") for full in (False, True)]
    builds = []
    for dtype, K, full in [*cases, ("fp32", MAX_KERNEL_SIZE, True)]:
        for kernel, name, optional in kernels:
            constants = {"C": 1024, "K": K} | ({} if full else dict.fromkeys(optional))
            if "SILU" in kernel.arg_names:
                constants["SILU"] = full
            blocks = find_blocks("short_conv", name, 1024, arch)
            case = f"{dtype}-K{K}" + "-full" * full
            builds.append(Build(kernel, case, dtype, constants, blocks, types))
    return builds


@triton.jit
def _load_inputs(  # type: ignore[no-untyped-def]
    p_x, p_state, first, doc, position, columns, mask, C: tl.constexpr, K: tl.constexpr
):
    """Load what documents hold at positions from -(K - 1) on."""
    at = (first + position).to(tl.int64) * C + columns
    b_x = tl.load(p_x + at, mask & (position >= 0), other=0.0).to(tl.float32)
    if p_state is not None:
        at = (doc * (K - 1) + position + K - 1).to(tl.int64) * C + columns
        b_x += tl.load(p_state + at, mask & (position < 0), other=0.0).to(tl.float32)
    return b_x


@triton.jit
def _convolve(  # type: ignore[no-untyped-def]
    p_x,
    p_weight,
    p_bias,
    p_state,
    first,
    doc,
    position,
    columns,
    mask,
    C: tl.constexpr,
    K: tl.constexpr,
):
    """Return the sum over the taps, before the activation."""
    b_sum = tl.zeros(mask.shape, tl.float32)
    if p_bias is not None:
        b_sum += tl.load(p_bias + columns, columns < C, other=0.0).to(tl.float32)
    for j in tl.static_range(K):
        before = position - (K - 1) + j
        b_x = _load_inputs(p_x, p_state, first, doc, before, columns, mask, C, K)
        b_sum += b_x * tl.load(p_weight + j * C + columns, columns < C, other=0.0)
    return b_sum


@triton.jit
def _short_conv_fwd_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_weight,
    p_bias,
    p_state,
    p_starts,
    p_docs,
    p_out,
    num_tokens,
    C: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (tokens < num_tokens) & (columns < C)
    doc = tl.load(p_docs + tokens, tokens < num_tokens, other=0)
    first = tl.load(p_starts + doc)
    position = tokens - first
    b_out = _convolve(p_x, p_weight, p_bias, p_state, first, doc, position, columns, mask, C, K)
    if SILU:
        b_out *= tl.sigmoid(b_out)
    tl.store(p_out + tokens.to(tl.int64) * C + columns, b_out.to(p_out.dtype.element_ty), mask)


@triton.jit
def _short_conv_bwd_weight_kernel(  # type: ignore[no-untyped-def]
    p_dout,
    p_x,
    p_weight,
    p_bias,
    p_state,
    p_starts,
    p_docs,
    p_dsum,
    p_partial,
    num_tokens,
    C: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (tokens < num_tokens) & (columns < C)
    doc = tl.load(p_docs + tokens, tokens < num_tokens, other=0)
    first = tl.load(p_starts + doc)
    position = tokens - first
    at = tokens.to(tl.int64) * C + columns
    b_dsum = tl.load(p_dout + at, mask, other=0.0).to(tl.float32)
    if SILU:
        b_sum = _convolve(p_x, p_weight, p_bias, p_state, first, doc, position, columns, mask, C, K)
        share = tl.sigmoid(b_sum)
        b_dsum *= share * (1.0 + b_sum * (1.0 - share))
        tl.store(p_dsum + at, b_dsum.to(p_dsum.dtype.element_ty), mask)
    p_row = p_partial + tl.program_id(0).to(tl.int64) * (K + 1) * C
    for j in tl.static_range(K):
        before = position - (K - 1) + j
        b_x = _load_inputs(p_x, p_state, first, doc, before, columns, mask, C, K)
        tl.store(p_row + j * C + columns, tl.sum(b_dsum * b_x, 0)[None, :], columns < C)
    tl.store(p_row + K * C + columns, tl.sum(b_dsum, 0)[None, :], columns < C)


@triton.jit
def _short_conv_bwd_input_kernel(  # type: ignore[no-untyped-def]
    p_dsum,
    p_dfinal,
    p_weight,
    p_starts,
    p_docs,
    p_dx,
    p_dstate,
    num_tokens,
    num_rows,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows are the tokens, then the K - 1 inputs of each document's state."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (rows < num_rows) & (columns < C)
    is_token = rows < num_tokens
    doc = tl.load(p_docs + rows, is_token, other=0)
    in_state = rows - num_tokens
    if p_dstate is not None:
        doc = tl.where(is_token, doc, in_state // (K - 1))
        doc = tl.where(rows < num_rows, doc, 0)
    first = tl.load(p_starts + doc)
    length = tl.load(p_starts + doc + 1) - first
    position = tl.where(is_token, rows - first, in_state % (K - 1) - (K - 1))
    b_dx = tl.zeros(mask.shape, tl.float32)
    for j in tl.static_range(K):
        after = position + (K - 1) - j
        at = (first + after).to(tl.int64) * C + columns
        b_dsum = tl.load(p_dsum + at, mask & (after >= 0) & (after < length), other=0.0)
        b_weight = tl.load(p_weight + j * C + columns, columns < C, other=0.0)
        b_dx += b_dsum.to(tl.float32) * b_weight
    if p_dfinal is not None:
        kept = position - length + K - 1
        at = (doc * (K - 1) + kept).to(tl.int64) * C + columns
        b_dx += tl.load(p_dfinal + at, mask & (kept >= 0), other=0.0).to(tl.float32)
    at = rows.to(tl.int64) * C + columns
    tl.store(p_dx + at, b_dx.to(p_dx.dtype.element_ty), mask & is_token)
    if p_dstate is not None:
        at = in_state.to(tl.int64) * C + columns
        tl.store(p_dstate + at, b_dx.to(p_dstate.dtype.element_ty), mask & (in_state >= 0))
