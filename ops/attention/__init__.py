"""Softmax attention: full, windowed, with sinks, grouped heads and packed documents.

Equations 1 and 2 of arXiv:2509.05276. `reference.py` is the definition; every implementation
returns the log-sum-exp beside the output, so that partial results over keys can be merged.
"""

import torch

from ops.attention.settings import Settings
from ops.registry import FLOATS, Implementation, choose

IMPLEMENTATIONS = (
    Implementation(
        "cpp",
        "ops.attention.cpp_impl",
        ("cpu",),
        (torch.bfloat16,),
        requires="ops.cpp_build:explain_no_amx",
    ),
    Implementation(
        "triton",
        "ops.attention.triton_impl",
        ("cuda",),
        (torch.float32, torch.bfloat16, torch.float16),
        requires="ops.triton_runtime:explain_absence",
        on_request=("cpu",),
    ),
    Implementation("torch", "ops.attention.torch_impl", None, FLOATS),
    Implementation("reference", "ops.attention.reference", None, FLOATS),
)
# A merge has no kernel in C++: whoever pins cpp gets PyTorch's, in every dtype.
MERGE_IMPLEMENTATIONS = (
    Implementation("cpp", "ops.attention.torch_merge", ("cpu",), FLOATS, on_request=("cpu",)),
    *IMPLEMENTATIONS[1:],
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window_size: int | None = None,
    num_sinks: int = 0,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `softmax(scale q k^T) v` over the visible keys, and the log-sum-exp of the scores.

    Query t sees key s of its own document where s <= t (causal), s > t - window_size (window), or
    s is among the document's first num_sinks keys. Gradients flow through both results.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, T_k, H_kv, D] of q's dtype; H_kv divides H and query head h reads head
            h // (H / H_kv). T_k may differ from T only without causal and cu_seqlens.
        v: values, shaped as k.
        causal: hide later keys.
        window_size: keys a query sees, itself included (tokens); None: no limit.
        num_sinks: first keys of each document that all its queries see, earlier ones included.
        scale: factor on the scores; None: D ** -0.5.
        cu_seqlens: bounds of the packed documents, int32 [N + 1] from 0 to T; needs B = 1.
        impl: pin an implementation by name.

    Returns:
        out [B, T, H, D] in q's dtype and lse [B, H, T], float32, natural log.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
    """
    _check_tensors(q, k, v)
    _check_pattern(q, k, causal, window_size, num_sinks)
    if cu_seqlens is not None:
        _check_documents(q, k, cu_seqlens)
    if q.numel() == 0 or k.numel() == 0:
        impl = "reference"  # kernels expect something to do
    function = choose("attention.attention", IMPLEMENTATIONS, q, impl)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    documents = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    out, lse = function(q, k, v, Settings(causal, window_size, num_sinks, scale, documents))
    return out, lse


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    settings: Settings,
    *,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `attention` of checked inputs, without a gradient.

    Returns:
        out [B, T, H, D] in q's dtype and lse [B, H, T], float32 (float64 for float64 inputs).
    """
    function = choose("attention.attention_fwd", IMPLEMENTATIONS, q, impl)
    out, lse = function(q, k, v, settings)
    return out, lse


def attention_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    settings: Settings,
    *,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk and dv of `attention_fwd`.

    out and lse may be those of a softmax over more keys than k holds: then the gradients are the
    share of these keys.
    """
    function = choose("attention.attention_bwd", IMPLEMENTATIONS, q, impl)
    dq, dk, dv = function(dout, dlse, q, k, v, out, lse, settings)
    return dq, dk, dv


def merge(
    out: torch.Tensor,
    lse: torch.Tensor,
    other_out: torch.Tensor,
    other_lse: torch.Tensor,
    *,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention over all keys from results over two disjoint sets of them.

    With w = sigmoid(other_lse - lse): out + w (other_out - out), and logaddexp of both lse
    (section 2 of arXiv:2310.01889). Gradients flow to all four. Who merges result after result
    keeps `out` in float32, which then stays so: every rounding to 16 bits would add up.

    Args:
        out: result over some keys [B, T, H, D]; the merged one has its dtype.
        lse: its log-sum-exp [B, H, T], float32; -inf where a query saw no key.
        other_out: result over the other keys, shaped as `out`, of any dtype.
        other_lse: its log-sum-exp, float32. Where it is -inf the merged result is the first one.
        impl: pin an implementation by name.

    Returns:
        out [B, T, H, D] in the dtype of `out` and lse [B, H, T], float32.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    _check_partial("out", out, lse)
    _check_partial("other_out", other_out, other_lse)
    if out.shape != other_out.shape or out.device != other_out.device:
        raise ValueError(
            f"other_out has shape {list(other_out.shape)} on {other_out.device}, out "
            f"{list(out.shape)} on {out.device}; give the results of the same queries"
        )
    impl = "reference" if out.numel() == 0 else impl
    function = choose("attention.merge", MERGE_IMPLEMENTATIONS, out, impl)
    merged, merged_lse = function(out, lse, other_out, other_lse)
    return merged, merged_lse


def _check_partial(name: str, out: torch.Tensor, lse: torch.Tensor) -> None:
    if out.dim() != 4 or lse.shape != (out.shape[0], out.shape[2], out.shape[1]):
        raise ValueError(
            f"{name} has shape {list(out.shape)} and its lse {list(lse.shape)}; "
            "give [B, T, H, D] and [B, H, T]"
        )
    if lse.dtype not in (torch.float32, torch.promote_types(out.dtype, torch.float32)):
        raise ValueError(f"the lse of {name} is {lse.dtype}; give float32")


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; give [batch, tokens, heads, dim]")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; convert {name}"
            )
    if v.shape != k.shape:
        raise ValueError(f"v has shape {list(v.shape)}, k {list(k.shape)}; give both the same")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k has shape {list(k.shape)}, q {list(q.shape)}; batch and dim must be equal"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k has {k.shape[2]} heads, which do not divide the {q.shape[2]} of q; "
            f"use a divisor of {q.shape[2]}"
        )


def _check_pattern(
    q: torch.Tensor, k: torch.Tensor, causal: bool, window_size: int | None, num_sinks: int
) -> None:
    if causal and k.shape[1] != q.shape[1]:
        raise ValueError(
            f"k has {k.shape[1]} tokens, q {q.shape[1]}; causal attention needs as many, "
            "otherwise set causal=False"
        )
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size={window_size} must be at least 1, or None for no limit")
    if window_size is not None and not causal:
        raise ValueError(f"window_size={window_size} needs causal=True; set it, or no window")
    if num_sinks < 0:
        raise ValueError(f"num_sinks={num_sinks} must not be negative; use 0 for none")


def _check_documents(q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    if q.shape[0] != 1 or k.shape[1] != q.shape[1]:
        raise ValueError(
            f"cu_seqlens needs one packed row of as many queries as keys, q has shape "
            f"{list(q.shape)}, k {list(k.shape)}; flatten the batch into the tokens"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; give int32 [N + 1]"
        )
    bounds = cu_seqlens.tolist()
    if bounds[:1] != [0] or bounds[-1] != q.shape[1] or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seqlens={bounds} must rise from 0 to the {q.shape[1]} tokens of q; "
            "add the missing bounds"
        )
