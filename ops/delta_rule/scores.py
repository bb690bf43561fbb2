"""Causal scores under decay, A_ts = sum_c x_tc k_sc exp(g_{s+1,c} + ... + g_{t,c}) for s < t.

A decay enters only as the exponential of a sum of terms <= 0, never of a difference of sums, so
that no decay, -inf included, loses digits or overflows; the gradient of g is summed likewise.
By channel, a chunk is halved again and again: the scores of the second half with the first factor
in the middle, exp(g_{s+1} + ... + g_{mid-1}) exp(g_mid + ... + g_t).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F


def scalar_scores(x: torch.Tensor, k: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    """Return the scores, zeros on and above the diagonal.

    Args:
        x: [n, H, R, C, D]; R kinds of rows that share the keys.
        k: [n, H, C, D].
        log_decay: [n, H, C, 1].

    Returns:
        [n, H, R, C, C].
    """
    return (x @ k.unsqueeze(2).transpose(-1, -2)).mul_(_decays(log_decay).unsqueeze(2))


def scalar_scores_backward(
    x: torch.Tensor,
    k: torch.Tensor,
    log_decay: torch.Tensor,
    scores: torch.Tensor,
    dscores: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, k and log_decay; `dscores` is zero where the scores are."""
    products = dscores * _decays(log_decay).unsqueeze(2)
    dx = products @ k.unsqueeze(2)
    dk = products.flatten(2, 3).transpose(-1, -2) @ x.flatten(2, 3)
    dsums = (dscores * scores).sum(2)
    return dx, dk, sums_from(dsums).tril_(-1).sum(-1, keepdim=True)


def vector_scores(x: torch.Tensor, k: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    """`scalar_scores` for log_decay [n, H, C, D]."""
    scores = x.new_zeros(*x.shape[:-1], x.shape[-2])
    for half, late, early in _halvings(log_decay):
        x_late = _late(x, half) * late.unsqueeze(2)
        k_early = (_early(k, half) * early).unsqueeze(2)
        _quarters(scores, half).copy_(x_late @ k_early.transpose(-1, -2))
    return scores


def vector_scores_backward(
    x: torch.Tensor,
    k: torch.Tensor,
    log_decay: torch.Tensor,
    _: torch.Tensor,
    dscores: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`scalar_scores_backward` for log_decay [n, H, C, D]; the scores are not needed."""
    dx, dk, dlog_decay = torch.zeros_like(x), torch.zeros_like(k), torch.zeros_like(log_decay)
    for half, late, early in _halvings(log_decay):
        x_late = _late(x, half) * late.unsqueeze(2)
        k_early = _early(k, half) * early
        dproducts = _quarters(dscores, half)
        dx_late = dproducts @ k_early.unsqueeze(2)
        dk_early = (dproducts.transpose(-1, -2) @ x_late).sum(2)
        _late(dlog_decay, half).add_(sums_from((dx_late * x_late).sum(2)))
        _early(dlog_decay, half).add_(exclusive_sums(dk_early * k_early))
        _late(dx, half).add_(dx_late.mul_(late.unsqueeze(2)))
        _early(dk, half).add_(dk_early.mul_(early))
    return dx, dk, dlog_decay


def sums_from(x: torch.Tensor) -> torch.Tensor:
    """Sum each row of [..., C, D] and those after it."""
    return x.flip(-2).cumsum(-2).flip(-2)


def exclusive_sums(x: torch.Tensor) -> torch.Tensor:
    """Sum the rows of [..., C, D] before each."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _decays(log_decay: torch.Tensor) -> torch.Tensor:
    """exp(g_{s+1} + ... + g_t) for s < t, else 0, [n, H, C, C]."""
    C = log_decay.shape[2]
    terms = log_decay.expand(*log_decay.shape[:-1], C).tril(-1)
    return terms.cumsum(2).exp_().tril_(-1)


def _halvings(log_decay: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield h and the factors of the late and the early half of every 2 h tokens, [.., h, D]."""
    half = 1
    while half < log_decay.shape[2]:
        late = _late(log_decay, half).cumsum(-2).exp_()
        rest = F.pad(_early(log_decay, half)[..., 1:, :], (0, 0, 0, 1))
        yield half, late, sums_from(rest).exp_()
        half *= 2


def _early(x: torch.Tensor, half: int) -> torch.Tensor:
    """[..., C, D] -> [..., C / 2 h, h, D], a view."""
    return x.unflatten(-2, (-1, 2 * half))[..., :half, :]


def _late(x: torch.Tensor, half: int) -> torch.Tensor:
    return x.unflatten(-2, (-1, 2 * half))[..., half:, :]


def _quarters(scores: torch.Tensor, half: int) -> torch.Tensor:
    """Late rows by early columns of each 2 h tokens, a view [..., C / 2 h, h, h] of [..., C, C]."""
    blocks = scores.unflatten(-1, (-1, 2 * half)).unflatten(-3, (-1, 2 * half))
    diagonal = blocks.diagonal(dim1=-4, dim2=-2)  # [..., 2 h, 2 h, C / 2 h]
    return diagonal.movedim(-1, -3)[..., half:, :half]
