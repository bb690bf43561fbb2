"""Merge of two partial attention results on NVIDIA and AMD (section 2 of arXiv:2310.01889)."""

import torch
import triton
import triton.language as tl

from ops.attention.autograd import Merge
from ops.attention.triton_tiles import load_rows, store_rows
from ops.triton_runtime import find_blocks


def merge(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ops.attention.merge`."""
    merged, merged_lse = Merge.apply(out, lse, other_out, other_lse, merge_fwd, merge_bwd)
    return merged, merged_lse


def merge_fwd(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the merged out [B, T, H, D] in the dtype of `out` and lse [B, H, T]."""
    out, lse, other_out, other_lse = (x.contiguous() for x in (out, lse, other_out, other_lse))
    merged, merged_lse = torch.empty_like(out), torch.empty_like(lse)
    grid, constants = _plan("merge_fwd", out)
    _merge_fwd_kernel[grid](
        out, lse, other_out, other_lse, merged, merged_lse, *out.shape[1:3], **constants
    )
    return merged, merged_lse


def merge_bwd(
    dmerged: torch.Tensor,
    dlse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    other_out: torch.Tensor,
    other_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of out, lse, other_out and other_lse."""
    inputs = [x.contiguous() for x in (dmerged, dlse, out, lse, other_out, other_lse)]
    grads = [torch.empty_like(x) for x in inputs[2:]]
    grid, constants = _plan("merge_bwd", out)
    _merge_bwd_kernel[grid](*inputs, *grads, *out.shape[1:3], **constants)
    dout, dlse, dother_out, dother_lse = grads
    return dout, dlse, dother_out, dother_lse


def _plan(kernel: str, out: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    B, T, H, D = out.shape
    BLOCK_D = max(16, triton.next_power_of_2(D))
    blocks = find_blocks("attention", kernel, BLOCK_D, out.device)
    return (B * H * triton.cdiv(T, blocks["BLOCK_T"]),), {"D": D, "BLOCK_D": BLOCK_D, **blocks}


@triton.jit
def _merge_fwd_kernel(  # type: ignore[no-untyped-def]
    p_out,
    p_lse,
    p_other_out,
    p_other_lse,
    p_merged,
    p_merged_lse,
    num_tokens,
    num_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    t0, offset, rows, stride = _locate(num_tokens, num_heads, D, BLOCK_T)
    inside = t0 + tl.arange(0, BLOCK_T) < num_tokens
    lse = tl.load(p_lse + rows, mask=inside, other=0.0)
    other_lse = tl.load(p_other_lse + rows, mask=inside, other=0.0)
    b_out = load_rows(p_out + offset, t0, num_tokens, stride, D, BLOCK_D, BLOCK_T, tl.float32, True)
    b_other = load_rows(
        p_other_out + offset, t0, num_tokens, stride, D, BLOCK_D, BLOCK_T, tl.float32, True
    )
    weight, other_weight = _weigh(lse, other_lse)
    merged = b_out * weight[:, None] + b_other * other_weight[:, None]
    store_rows(p_merged + offset, merged, t0, num_tokens, stride, D, BLOCK_D, BLOCK_T)
    # log(e^a + e^b) = max(a, b) - log(the larger weight); without keys on both sides, -inf.
    merged_lse = tl.maximum(lse, other_lse) - tl.log(tl.maximum(weight, other_weight))
    tl.store(p_merged_lse + rows, merged_lse, mask=inside)


@triton.jit
def _merge_bwd_kernel(  # type: ignore[no-untyped-def]
    p_dmerged,
    p_dmerged_lse,
    p_out,
    p_lse,
    p_other_out,
    p_other_lse,
    p_dout,
    p_dlse,
    p_dother_out,
    p_dother_lse,
    num_tokens,
    num_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    t0, offset, rows, stride = _locate(num_tokens, num_heads, D, BLOCK_T)
    inside = t0 + tl.arange(0, BLOCK_T) < num_tokens
    lse = tl.load(p_lse + rows, mask=inside, other=0.0)
    other_lse = tl.load(p_other_lse + rows, mask=inside, other=0.0)
    dlse = tl.load(p_dmerged_lse + rows, mask=inside, other=0.0)
    b_out = load_rows(p_out + offset, t0, num_tokens, stride, D, BLOCK_D, BLOCK_T, tl.float32, True)
    b_other = load_rows(
        p_other_out + offset, t0, num_tokens, stride, D, BLOCK_D, BLOCK_T, tl.float32, True
    )
    b_dmerged = load_rows(
        p_dmerged + offset, t0, num_tokens, stride, D, BLOCK_D, BLOCK_T, tl.float32, True
    )
    weight, other_weight = _weigh(lse, other_lse)
    difference = tl.sum(b_dmerged * (b_other - b_out), 1)
    towards_other = other_weight * dlse + weight * other_weight * difference
    tl.store(p_dlse + rows, dlse - towards_other, mask=inside)
    tl.store(p_dother_lse + rows, towards_other, mask=inside)
    share, rest = b_dmerged * other_weight[:, None], b_dmerged * weight[:, None]
    store_rows(p_dout + offset, rest, t0, num_tokens, stride, D, BLOCK_D, BLOCK_T)
    store_rows(p_dother_out + offset, share, t0, num_tokens, stride, D, BLOCK_D, BLOCK_T)


@triton.jit
def _locate(num_tokens, num_heads, D: tl.constexpr, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the program's first token, its head's offset, its places in lse and the stride."""
    num_blocks = tl.cdiv(num_tokens, BLOCK_T)
    t0 = tl.program_id(0) % num_blocks * BLOCK_T
    row_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    stride = num_heads * D
    offset = row_head // num_heads * num_tokens * stride + row_head % num_heads * D
    return t0, offset, row_head * num_tokens + t0 + tl.arange(0, BLOCK_T), stride


@triton.jit
def _weigh(lse, other_lse):  # type: ignore[no-untyped-def]
    """Return both sides' shares of the softmax; a side without keys has none."""
    other_weight = tl.where(other_lse == float("-inf"), 0.0, tl.sigmoid(other_lse - lse))
    weight = tl.where(other_lse == float("-inf"), 1.0, tl.sigmoid(lse - other_lse))
    return weight, other_weight
