"""The definition of attention: one dense mask, float64, differentiable by autograd.

Equations 1 and 2 of arXiv:2509.05276, with sinks, grouped heads and packed documents.
"""

import torch

from ops.attention.settings import Settings


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ops.attention.attention` by its definition; memory grows with T squared."""
    group = q.shape[2] // k.shape[2]
    visible = _visible_keys(q, k, settings)
    keys = k.double().repeat_interleave(group, dim=2)
    values = v.double().repeat_interleave(group, dim=2)
    scores = settings.scale * torch.einsum("bthd,bshd->bhts", q.double(), keys)
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    out = torch.einsum("bhts,bshd->bthd", (scores - lse[..., None]).exp(), values)
    return out.to(q.dtype), lse.float()


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `attention` does, without a gradient."""
    with torch.no_grad():
        return attention(q, k, v, settings)


def attention_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk and dv by their definition, out and lse those of a softmax over all keys."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.double().repeat_interleave(group, dim=2) for x in (k, v))
    scores = settings.scale * torch.einsum("bthd,bshd->bhts", q.double(), keys)
    scores = scores.masked_fill(~_visible_keys(q, k, settings), float("-inf"))
    p = (scores - lse.double()[..., None]).exp()
    delta = (dout.double() * out.double()).sum(-1).mT
    if dlse is not None:
        delta = delta - dlse.double()
    dp = torch.einsum("bthd,bshd->bhts", dout.double(), values)
    ds = settings.scale * p * (dp - delta[..., None])
    dq = torch.einsum("bhts,bshd->bthd", ds, keys)
    dk = torch.einsum("bhts,bthd->bshd", ds, q.double()).unflatten(2, (-1, group)).sum(3)
    dv = torch.einsum("bhts,bthd->bshd", p, dout.double()).unflatten(2, (-1, group)).sum(3)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def merge(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ops.attention.merge` as a mean weighted by the sums of exponentials."""
    is_empty = other_lse == float("-inf")
    other = other_lse.double().masked_fill(is_empty, 0.0)
    total = torch.logaddexp(lse.double(), other)
    weight = (lse.double() - total).exp().masked_fill(is_empty, 1.0).mT[..., None]
    other_weight = (other - total).exp().masked_fill(is_empty, 0.0).mT[..., None]
    merged = weight * out.double() + other_weight * other_out.double()
    return merged.to(out.dtype), torch.where(is_empty, lse.double(), total).to(lse.dtype)


def _visible_keys(q: torch.Tensor, k: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Return [T, T_k], true where the query of the row sees the key of the column."""
    t = torch.arange(q.shape[1], device=q.device)[:, None]
    s = torch.arange(k.shape[1], device=q.device)
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if settings.causal:
        visible = s <= t
    if settings.window_size is not None:
        visible = visible & (s > t - settings.window_size)
    if settings.documents is None:
        return visible | (s < settings.num_sinks)
    bounds = torch.tensor(settings.documents, device=q.device)
    document = torch.bucketize(s, bounds[1:-1], right=True)
    is_sink = s - bounds[document] < settings.num_sinks
    return (visible | is_sink) & (document[:, None] == document)
