"""The chunked delta rule on NVIDIA and AMD GPUs: launches and autograd.

See `torch_impl.py` for the algorithm and the notation. The inputs and the states that enter the
chunks are kept for the backward pass; everything else is computed again. Between the kernels the
errors and their gradients stay float32: rounded to 16 bits, they would double the error of all.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ops.delta_rule.triton_builds import (
    HEAD_DIMS,
    KERNELS,
    SEARCH,
    chunk_size,
    constants,
    list_builds,
    settings,
)
from ops.triton_runtime import dot_dtype

__all__ = ["SEARCH", "delta_rule", "list_builds"]


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor | None,
    scale: float,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.delta_rule.delta_rule`.

    Raises:
        ValueError: a head is wider than the kernels take.
    """
    B, T, _, D_k = q.shape
    D_v = v.shape[3]
    lengths = [T] * B if cu_seqlens is None else cu_seqlens.diff().tolist()
    cut = _cut(lengths, chunk_size(q.dtype), q.device)
    # Channels of zeros change nothing.
    pad_k, pad_v = (0, _width(D_k) - D_k), (0, _width(D_v) - D_v)
    if log_decay is None:
        log_decay = torch.zeros_like(beta)
    elif log_decay.dim() == 4:
        log_decay = F.pad(log_decay, pad_k)
    q, k, v = F.pad(q, pad_k), F.pad(k, pad_k), F.pad(v, pad_v)
    if initial_state is not None:
        initial_state = F.pad(initial_state.float(), pad_v + pad_k)
    inputs = (q, k, v, beta.float(), log_decay.float())
    rows = (x.reshape(B * T, *x.shape[2:]) for x in inputs)
    out, final = _DeltaRule.apply(*rows, initial_state, scale, cut)
    return out.unflatten(0, (B, T))[..., :D_v], final[..., :D_k, :D_v]


def _width(head_dim: int) -> int:
    if head_dim > HEAD_DIMS[-1]:
        raise ValueError(
            f"ops.delta_rule=triton takes heads of {HEAD_DIMS[-1]} channels at most, not "
            f"{head_dim}; ops.delta_rule=torch takes any"
        )
    return next(width for width in HEAD_DIMS if width >= head_dim)


class _Cut(NamedTuple):
    """Where the documents are cut into chunks."""

    chunks: torch.Tensor
    """int32 [n, 2], first token and number of tokens."""
    documents: torch.Tensor
    """int32 [N + 1], first chunk of each document."""


def _cut(lengths: list[int], C: int, device: torch.device) -> _Cut:
    chunks, documents, start = [], [0], 0
    for length in lengths:
        for position in range(0, length, C):
            chunks.append((start + position, min(C, length - position)))
        documents.append(len(chunks))
        start += length
    return _Cut(*(torch.tensor(x, dtype=torch.int32, device=device) for x in (chunks, documents)))


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, q, k, v, beta, log_decay, initial_state, scale, cut
    ):
        q, k, v, beta, log_decay = (x.contiguous() for x in (q, k, v, beta, log_decay))
        out, final, states = delta_rule_fwd(q, k, v, beta, log_decay, initial_state, scale, cut)
        ctx.save_for_backward(q, k, v, beta, log_decay, states)
        ctx.scale, ctx.cut, ctx.has_initial = scale, cut, initial_state is not None
        return out, final

    @staticmethod
    def backward(ctx: Any, dout, dfinal):  # type: ignore[no-untyped-def]
        q, k, v, beta, log_decay, states = ctx.saved_tensors
        *grads, dinitial = delta_rule_bwd(
            q, k, v, beta, log_decay, states, dout, dfinal, ctx.scale, ctx.cut
        )
        return *grads, dinitial if ctx.has_initial else None, None, None


def delta_rule_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor,
    initial_state: torch.Tensor | None,
    scale: float,
    cut: _Cut,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return out, the final states and the states that enter the chunks.

    Args:
        q: [tokens, H, D_k], contiguous, and the others likewise; beta, log_decay and
            initial_state float32.
    """
    (n, _), (_, H, _), (_, H_state, D_k), D_v = cut.chunks.shape, q.shape, k.shape, v.shape[2]
    decay = _sum_decay(log_decay, cut, q.dtype)
    scores = _score(k, k, v, decay, 1.0, cut)
    w, error, k_down, total, _ = _prepare(k, v, beta, decay, scores, cut, keep=False)
    states = beta.new_empty(n, H_state, D_k, D_v)
    final = beta.new_empty(len(cut.documents) - 1, H_state, D_k, D_v)
    initial_state = None if initial_state is None else initial_state.contiguous()
    options = _options("states_fwd", k, v, decay)
    KERNELS["states_fwd"][len(final) * H_state, D_v // options["BV"]](
        w, error, k_down, total, beta, initial_state, *cut, states, final, H_state, **options
    )
    reads, out = _score(q, k, v, decay, scale, cut), q.new_empty(*q.shape[:2], D_v)
    options = _options("out_fwd", k, v, decay)
    KERNELS["out_fwd"][n, H, D_v // options["BV"]](
        q, beta, *decay, error, states, reads, cut.chunks, out, scale, H_state, H // H_state,
        **options,
    )  # fmt: skip
    return out, final, states


def delta_rule_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor,
    states: torch.Tensor,
    dout: torch.Tensor,
    dfinal: torch.Tensor,
    scale: float,
    cut: _Cut,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of q, k, v, beta, log_decay and the initial states."""
    n, H_state, D_k, D_v = states.shape
    heads = (H_state, q.shape[1] // H_state)
    dout, dfinal = dout.contiguous(), dfinal.contiguous()
    decay = _sum_decay(log_decay, cut, q.dtype)
    scores, reads = _score(k, k, v, decay, 1.0, cut), _score(q, k, v, decay, scale, cut)
    w, error, k_down, total, inverse = _prepare(k, v, beta, decay, scores, cut, keep=True)

    du, dstates = torch.empty_like(error), torch.empty_like(states)
    options = _options("values_bwd", k, v, decay)
    KERNELS["values_bwd"][n, H_state, D_v // options["BV"]](
        q, *decay, w, error, states, reads, dout, cut.chunks, du, dstates, scale, *heads, **options
    )
    dinitial = torch.empty_like(dfinal)
    options = _options("states_bwd", k, v, decay)
    KERNELS["states_bwd"][len(dfinal) * H_state, D_v // options["BV"]](
        w, k_down, total, beta, dfinal, *cut, du, dstates, dinitial, H_state, **options
    )
    dv, dbeta = torch.empty_like(v), torch.empty_like(beta)
    dscores, dreads = torch.empty_like(scores), torch.empty_like(reads)
    KERNELS["solve_bwd"][n, H_state](
        beta, error, du, dout, inverse, scores, cut.chunks, dv, dbeta, dscores, dreads, *heads,
        **_options("solve_bwd", k, v, decay),
    )  # fmt: skip
    dq_scores, dk_reads, dsums_reads = _score_bwd(q, k, v, decay, dreads, scale, cut)
    dk_rows, dk_columns, dsums = _score_bwd(k, k, v, decay, dscores, 1.0, cut)
    dk_scores = dk_rows.add_(dk_columns).add_(_sum_group(dk_reads, heads, -2))
    dsums.add_(_sum_group(dsums_reads, heads, 1 - log_decay.dim()))
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    options = _options("inputs_bwd", k, v, decay)
    ddecay, dnext = torch.empty_like(dsums), torch.empty_like(dsums)
    KERNELS["inputs_bwd"][n, H_state, D_k // options["BK"]](
        q, k, beta, *decay, error, states, dout, dv, dstates, dq_scores, dk_scores, dsums,
        cut.chunks, dq, dk, ddecay, dnext, scale, *heads, beta.numel(), **options,
    )  # fmt: skip
    if log_decay.dim() == 2:
        ddecay, dnext = ddecay.sum(0), dnext.sum(0)
    ddecay[1:] += dnext[:-1]
    return dq, dk, dv, dbeta, ddecay, dinitial


def _sum_group(x: torch.Tensor, heads: tuple[int, int], dim: int) -> torch.Tensor:
    return x.unflatten(dim, heads).sum(dim)


class _Decay(NamedTuple):
    """Decay as the kernels take it."""

    values: torch.Tensor
    """[tokens, H_state], or by channel [tokens, H_state, D_k] summed since the chunk began."""
    rest: torch.Tensor | None
    """What the sums round off, for float32 inputs."""


def _sum_decay(log_decay: torch.Tensor, cut: _Cut, dtype: torch.dtype) -> _Decay:
    if log_decay.dim() == 2:
        return _Decay(log_decay, None)
    _, H_state, D_k = log_decay.shape
    sums = torch.empty_like(log_decay)
    rest = torch.empty_like(log_decay) if dtype == torch.float32 else None
    options = settings("sums", D_k, D_k, log_decay.device, dtype, vector=True)
    KERNELS["sums"][len(cut.chunks), H_state, D_k // options["BLOCK"]](
        log_decay, cut.chunks, sums, rest, H_state, D_K=D_k, **options
    )
    return _Decay(sums, rest)


def _score(
    x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: _Decay, scale: float, cut: _Cut
) -> torch.Tensor:
    """Return the scores [n, heads of x, C, C]: A of the keys with its diagonal, P of queries."""
    C, (_, H_state, _) = chunk_size(k.dtype), k.shape
    scores = k.new_empty(len(cut.chunks), x.shape[1], C, C)
    KERNELS["scores_fwd"][scores.shape[:2]](
        x, k, *decay, cut.chunks, scores, scale, H_state, x.shape[1] // H_state,
        **_options("scores_fwd", k, v, decay),
    )  # fmt: skip
    return scores


def _score_bwd(
    x: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: _Decay,
    dscores: torch.Tensor,
    scale: float,
    cut: _Cut,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, k and the sums of decay for each head of x, float32."""
    (rows, H, D_k), H_state = x.shape, k.shape[1]
    options = _options("scores_bwd", k, v, decay)
    num_blocks = D_k // options["BK"]
    dx, dk = (torch.empty_like(x, dtype=torch.float32) for _ in range(2))
    dsums = dx.new_empty(x.shape if decay.values.dim() == 3 else (num_blocks, rows, H))
    KERNELS["scores_bwd"][len(cut.chunks), H, num_blocks](
        x, k, *decay, cut.chunks, dscores, dx, dk, dsums, scale, H_state, H // H_state, rows * H,
        **options,
    )  # fmt: skip
    return dx, dk, dsums


def _prepare(
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    decay: _Decay,
    scores: torch.Tensor,
    cut: _Cut,
    *,
    keep: bool,
) -> tuple[Any, ...]:
    """Return W, T v, k exp(r), exp(b_C) and, to `keep`, T."""
    n, (_, H_state, D_k) = len(cut.chunks), k.shape
    w, k_down = torch.empty_like(k), torch.empty_like(k)
    solved_v = torch.empty_like(v, dtype=torch.float32)
    total = beta.new_empty(n, H_state, D_k)
    inverse = torch.empty_like(scores) if keep else None
    KERNELS["prepare"][n, H_state](
        k, v, beta, *decay, cut.chunks, scores, w, solved_v, k_down, total, inverse, H_state,
        **_options("prepare", k, v, decay),
    )  # fmt: skip
    return w, solved_v, k_down, total, inverse


def _options(name: str, k: torch.Tensor, v: torch.Tensor, decay: _Decay) -> dict[str, Any]:
    """Return the constants and the launch settings of a kernel."""
    D_K, D_V, vector = k.shape[-1], v.shape[-1], decay.values.dim() == 3
    fixed = constants(name, D_K, D_V, k.dtype, dot_dtype(k), vector=vector)
    return fixed | settings(name, D_K, D_V, k.device, k.dtype, vector=vector)
