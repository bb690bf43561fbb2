"""Linear attention with optional scalar or per-channel decay (eq. 4, 10, 11 of arXiv:2509.05276).

S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t        o_t = scale q_t S_t

Scalar decay is RetNet and Lightning Attention (constant) or Mamba-2; one per channel is GLA, and
HGRN2 with k = 1 - exp(log_decay).
"""

import torch

from ops.registry import FLOATS, Implementation, choose

IMPLEMENTATIONS = (
    Implementation(
        "cpp",
        "ops.linear_attention.cpp_impl",
        ("cpu",),
        (torch.bfloat16,),
        requires="ops.cpp_build:explain_no_amx",
    ),
    Implementation(
        "triton",
        "ops.linear_attention.triton_impl",
        ("cuda",),
        (torch.float32, torch.bfloat16, torch.float16),
        requires="ops.triton_runtime:explain_absence",
        on_request=("cpu",),
    ),
    Implementation("torch", "ops.linear_attention.torch_impl", None, FLOATS),
    Implementation("reference", "ops.linear_attention.reference", None, FLOATS),
)
# One token is too little for the kernel of the CPU.
STEP_IMPLEMENTATIONS = tuple(row for row in IMPLEMENTATIONS if row.name != "cpp")


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mix tokens by a decaying outer-product state.

    Args:
        q: [B, T, H, D_k].
        k: [B, T, H_state, D_k]; H_state divides H and query head h reads state
            h // (H / H_state).
        v: [B, T, H_state, D_v].
        log_decay: None (no decay), [B, T, H_state] or [B, T, H_state, D_k]; at most 0, any float
            dtype, -inf allowed.
        scale: factor on q; default D_k ** -0.5.
        initial_state: [B, H_state, D_k, D_v], or one per document with `cu_seqlens`.
        output_final_state: also return the state after the last token.
        cu_seqlens: int32 [N+1], documents packed in one row (B = 1); each starts afresh.
        impl: "reference" | "torch" | "triton" | "cpp"; None lets the registry choose.

    Returns:
        out [B, T, H, D_v] in the dtype of q; final state float32 (float64 for float64 inputs)
        [B or N, H_state, D_k, D_v], or None.

    Raises:
        ValueError: shapes do not fit or the pinned implementation cannot run.
    """
    check_inputs(q, k, v, log_decay, initial_state, cu_seqlens)
    function = choose("linear_attention.linear_attention", IMPLEMENTATIONS, q, impl)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, state = function(q, k, v, log_decay, scale, initial_state, cu_seqlens)
    return out, state if output_final_state else None


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    state: torch.Tensor,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Advance `state` by one token, in place, and read it (decoding; no gradient).

    Args:
        q: [B, H, D_k]; k [B, H_state, D_k]; v [B, H_state, D_v]; log_decay None, [B, H_state] or
            [B, H_state, D_k].
        state: float32 [B, H_state, D_k, D_v], overwritten.
        scale: factor on q; default D_k ** -0.5.
        impl: "reference" | "torch" | "triton"; None lets the registry choose.

    Returns:
        [B, H, D_v] in the dtype of q.

    Raises:
        ValueError: shapes do not fit or the pinned implementation cannot run.
    """
    decay = None if log_decay is None else log_decay.unsqueeze(1)
    check_inputs(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), decay, state, None)
    if state.dtype != torch.float32:
        raise ValueError(f"state is {state.dtype} and must be float32, which loses no token")
    function = choose("linear_attention.linear_attention_step", STEP_IMPLEMENTATIONS, q, impl)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: torch.Tensor = function(q, k, v, log_decay, state, scale)
    return out


def check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the inputs of a recurrent operator fit, see `linear_attention`."""
    B, T, H, D_k = q.shape
    H_state, D_v = v.shape[2:]
    if k.shape != (B, T, H_state, D_k) or v.shape[:2] != (B, T):
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be [B, T, H_state, D] with the B, T "
            f"and D_k of q {tuple(q.shape)}"
        )
    if H % H_state:
        raise ValueError(f"{H_state} state heads must divide the {H} query heads")
    if log_decay is not None and log_decay.shape not in ((B, T, H_state), (B, T, H_state, D_k)):
        raise ValueError(
            f"log_decay {tuple(log_decay.shape)} must be {(B, T, H_state)} or "
            f"{(B, T, H_state, D_k)}"
        )
    if T == 0:
        raise ValueError(f"q {tuple(q.shape)} holds no token; T must be 1 at least")
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"cu_seqlens needs packed input with B=1, not B={B}")
    if cu_seqlens is not None and (int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != T):
        raise ValueError(
            f"cu_seqlens runs from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}; it must run from "
            f"0 to T={T}"
        )
    num_states = B if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is not None and initial_state.shape != (num_states, H_state, D_k, D_v):
        raise ValueError(
            f"initial_state {tuple(initial_state.shape)} must be {(num_states, H_state, D_k, D_v)}"
        )
