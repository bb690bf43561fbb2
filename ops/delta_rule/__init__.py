"""The delta rule, plain (arXiv:2406.06484) or gated by a scalar or by channel (arXiv:2412.06464,
arXiv:2510.26692): every token decays the state and corrects what it holds under its key.

S'_t = diag(exp(log_decay_t)) S_{t-1}    S_t = S'_t + beta_t k_t^T (v_t - k_t S'_t)
o_t = scale q_t S_t
"""

import torch

from ops.linear_attention import check_inputs
from ops.registry import FLOATS, Implementation, choose

IMPLEMENTATIONS = (
    Implementation(
        "triton",
        "ops.delta_rule.triton_impl",
        ("cuda",),
        (torch.float32, torch.bfloat16, torch.float16),
        requires="ops.triton_runtime:explain_absence",
        on_request=("cpu",),
    ),
    Implementation("torch", "ops.delta_rule.torch_impl", None, FLOATS),
    Implementation("reference", "ops.delta_rule.reference", None, FLOATS),
)


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mix tokens by a state that every token corrects.

    Args:
        q: [B, T, H, D_k].
        k: [B, T, H_state, D_k]; H_state divides H and query head h reads state
            h // (H / H_state). The caller normalizes: with a key longer than sqrt(2 / beta) the
            state can grow without bound.
        v: [B, T, H_state, D_v].
        beta: [B, T, H_state], the strength of a correction: in (0, 1), up to 2 for negative
            eigenvalues of the transition; any float dtype.
        log_decay: None (no decay), [B, T, H_state] or [B, T, H_state, D_k]; at most 0, any float
            dtype, -inf allowed.
        scale: factor on q; default D_k ** -0.5.
        initial_state: [B, H_state, D_k, D_v], or one per document with `cu_seqlens`.
        output_final_state: also return the state after the last token.
        cu_seqlens: int32 [N+1], documents packed in one row (B = 1); each starts afresh.
        impl: "reference" | "torch" | "triton"; None lets the registry choose.

    Returns:
        out [B, T, H, D_v] in the dtype of q; final state float32 (float64 for float64 inputs)
        [B or N, H_state, D_k, D_v], or None.

    Raises:
        ValueError: shapes do not fit or the pinned implementation cannot run.
    """
    check_inputs(q, k, v, log_decay, initial_state, cu_seqlens)
    if beta.shape != v.shape[:3]:
        raise ValueError(f"beta {tuple(beta.shape)} must be {tuple(v.shape[:3])}")
    function = choose("delta_rule.delta_rule", IMPLEMENTATIONS, q, impl)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, state = function(q, k, v, beta, log_decay, scale, initial_state, cu_seqlens)
    return out, state if output_final_state else None


def delta_rule_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor | None,
    state: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Advance `state` by one token, in place, and read it (decoding).

    Args:
        q: [B, H, D_k]; k [B, H_state, D_k]; v [B, H_state, D_v]; beta [B, H_state]; log_decay
            None, [B, H_state] or [B, H_state, D_k].
        state: float32 [B, H_state, D_k, D_v], overwritten.

    Returns:
        [B, H, D_v] in the dtype of q.
    """
    if log_decay is not None:
        decay = log_decay.float().exp()
        state.mul_(decay[..., None] if decay.dim() == 3 else decay[..., None, None])
    key = k.float()[..., None, :]
    error = v.float()[..., None, :] - key @ state
    state.add_(key.transpose(-1, -2) * (beta.float()[..., None, None] * error))
    B, H, D_k = q.shape
    grouped = q.float().view(B, k.shape[1], H // k.shape[1], D_k)
    out = grouped @ state * (D_k**-0.5 if scale is None else scale)
    return out.view(B, H, v.shape[-1]).to(q.dtype)
