"""Merge of two partial attention results in PyTorch (section 2 of arXiv:2310.01889)."""

import torch

from ops.attention.autograd import Merge


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
    weight = _weigh_other(lse, other_lse)
    wide = torch.promote_types(out.dtype, lse.dtype)
    merged = torch.lerp(out.to(wide), other_out.to(wide), weight.to(wide))
    return merged.to(out.dtype), torch.logaddexp(lse, other_lse)


def merge_bwd(
    dmerged: torch.Tensor,
    dlse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    other_out: torch.Tensor,
    other_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of out, lse, other_out and other_lse.

    With w the weight of the other side: w dmerged goes to other_out, and to other_lse
    w dlse + w (1 - w) dmerged (other_out - out).
    """
    weight = _weigh_other(lse, other_lse)
    wide = torch.promote_types(out.dtype, lse.dtype)
    share = dmerged.to(wide) * weight.to(wide)
    difference = (dmerged.to(wide) * (other_out.to(wide) - out.to(wide))).sum(-1).mT
    w = weight[..., 0].mT
    towards_other = w * dlse + w * (1 - w) * difference
    return (
        (dmerged - share).to(out.dtype),
        (dlse - towards_other).to(lse.dtype),
        share.to(other_out.dtype),
        towards_other.to(other_lse.dtype),
    )


def _weigh_other(lse: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Return the other side's share of the softmax, [B, T, H, 1]; 0 where it has no keys."""
    weight = torch.sigmoid(other_lse - lse).masked_fill(other_lse == float("-inf"), 0.0)
    return weight.mT[..., None]
