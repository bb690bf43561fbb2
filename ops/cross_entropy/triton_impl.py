"""Cross entropy of a linear head with one kernel beside the matrix products.

A program reads a row of logits twice: for its log-sum-exp, by blocks and without a maximum known
beforehand, and to write the gradient over it.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from ops.cross_entropy.chunks import sum_losses
from ops.triton_build import Build
from ops.triton_runtime import Blocks, find_blocks

SEARCH: dict[str, tuple[Blocks, ...]] = {
    "cross_entropy": tuple(
        {"BLOCK_V": block, "num_warps": warps, "num_stages": 1}
        for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8), (8192, 16))
    )
}


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ops.cross_entropy.linear_cross_entropy` of hidden [N, E].

    Tokens that do not count are computed as others are: to leave them out, the host would wait.
    """
    turn = partial(_turn, labels.contiguous(), ignore_index, label_smoothing, z_loss)
    return sum_losses(hidden.contiguous(), weight, turn), (labels != ignore_index).sum()


def list_builds(arch: str) -> list[Build]:
    """Return the kernel in every combination that ships."""
    blocks = find_blocks("cross_entropy", "cross_entropy", 1 << 17, arch)
    types = {"p_labels": "*i64", "p_losses": "*fp32", "label_smoothing": "fp32", "z_loss": "fp32"}
    return [
        Build(
            _cross_entropy_fwd_kernel,
            f"{dtype}-{'grad' if needs_grad else 'loss'}",
            dtype,
            {"NEEDS_GRAD": needs_grad},
            blocks,
            types,
        )
        for dtype in ("bf16", "fp16", "fp32")
        for needs_grad in (True, False)
    ]


def _turn(
    labels: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logits: torch.Tensor,
    chunk: slice,
    needs_grad: bool,
) -> torch.Tensor:
    """See `ops.cross_entropy.chunks.Turn`."""
    num_tokens, vocab_size = logits.shape
    losses = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    blocks = find_blocks("cross_entropy", "cross_entropy", vocab_size, logits.device)
    _cross_entropy_fwd_kernel[(num_tokens,)](
        logits,
        labels[chunk],
        losses,
        vocab_size,
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        NEEDS_GRAD=needs_grad,
        **blocks,
    )
    return losses.sum()


@triton.jit
def _cross_entropy_fwd_kernel(  # type: ignore[no-untyped-def]
    p_logits,
    p_labels,
    p_losses,
    vocab_size,
    ignore_index,
    label_smoothing,
    z_loss,
    NEEDS_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + row * vocab_size
    label = tl.load(p_labels + row)
    cols = tl.arange(0, BLOCK_V)
    if label == ignore_index:
        tl.store(p_losses + row, 0.0)
        if NEEDS_GRAD:
            b_zero = tl.zeros((BLOCK_V,), p_logits.dtype.element_ty)
            for start in range(0, vocab_size, BLOCK_V):
                tl.store(p_row + start + cols, b_zero, mask=start + cols < vocab_size)
    else:
        is_inside = (label >= 0) & (label < vocab_size)
        label_logit = tl.load(p_row + label, mask=is_inside, other=float("nan")).to(tl.float32)
        # The label is left out of the sum: its loss is exact even where the others are tiny.
        top, others, total_logit = label_logit, 0.0, 0.0
        for start in range(0, vocab_size, BLOCK_V):
            b_mask = start + cols < vocab_size
            b_logits = tl.load(p_row + start + cols, mask=b_mask, other=0.0).to(tl.float32)
            total_logit += tl.sum(b_logits)
            b_logits = tl.where(b_mask & (start + cols != label), b_logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(b_logits))
            others = others * tl.exp(top - new_top) + tl.sum(tl.exp(b_logits - new_top))
            top = new_top
        at_label = tl.exp(label_logit - top)
        total = others + at_label
        lse = top + tl.log(total)
        # log(1 + ratio) where 1 + ratio is rounded: the quotient corrects for the rounding.
        ratio = others / tl.maximum(at_label, others)
        rounded = 1.0 + ratio
        is_lost = rounded == 1.0
        log1p = tl.log(rounded) * ratio / tl.where(is_lost, 1.0, rounded - 1.0)
        log1p = tl.where(is_lost, ratio, log1p)
        label_loss = tl.where(others < at_label, log1p, lse - label_logit)
        spread_loss = lse - total_logit / vocab_size
        loss = label_loss + label_smoothing * (spread_loss - label_loss) + z_loss * lse * lse
        tl.store(p_losses + row, loss)
        if NEEDS_GRAD:
            excess = 2.0 * z_loss * lse
            share = label_smoothing / vocab_size
            dlabel = label_smoothing - share + (excess * at_label - others) / total
            factor = (1.0 + excess) / total
            for start in range(0, vocab_size, BLOCK_V):
                b_mask = start + cols < vocab_size
                b_logits = tl.load(p_row + start + cols, mask=b_mask, other=0.0).to(tl.float32)
                b_dlogits = factor * tl.exp(b_logits - top) - share
                b_dlogits = tl.where(start + cols == label, dlabel, b_dlogits)
                tl.store(p_row + start + cols, b_dlogits.to(p_row.dtype.element_ty), mask=b_mask)
