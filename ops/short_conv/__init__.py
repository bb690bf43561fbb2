"""Short causal depthwise convolution over tokens, within packed documents.

out[t, c] = bias[c] + sum_j weight[c, j] x[t - (K - 1) + j, c], then silu if asked for; what lies
before the first token of a document is its state.
"""

from typing import Literal

import torch

from ops.registry import FLOATS, Implementation, choose

MAX_KERNEL_SIZE = 8

IMPLEMENTATIONS = (
    Implementation(
        "triton",
        "ops.short_conv.triton_impl",
        ("cuda",),
        (torch.float32, torch.bfloat16, torch.float16),
        requires="ops.triton_runtime:explain_absence",
        on_request=("cpu",),
    ),
    Implementation("torch", "ops.short_conv.torch_impl", None, FLOATS),
    Implementation("reference", "ops.short_conv.reference", None, FLOATS),
)


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    activation: Literal["silu"] | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Convolve each channel with its own K taps; gradients flow through both results.

    Args:
        x: [B, T, C].
        weight: [C, K] with K of 2 to 8; tap K - 1 is on the current token.
        bias: [C].
        state: [B, C, K - 1], or one per document with `cu_seqlens`, in the dtype of x: the inputs
            before the first token, the latest last; None: zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: int32 [N + 1], documents packed in one row (B = 1).
        activation: applied to the sum.
        impl: pin an implementation by name; None lets the registry choose.

    Returns:
        out [B, T, C] and the final state [B or N, C, K - 1] or None, in the dtype of x.

    Raises:
        ValueError: shapes do not fit or the pinned implementation cannot run.
    """
    _check(x.shape, weight, bias, activation)
    bounds = _find_bounds(x, cu_seqlens)
    expected = (len(bounds) - 1, x.shape[2], weight.shape[1] - 1)
    if state is not None and (state.shape != expected or state.dtype != x.dtype):
        raise ValueError(
            f"state {tuple(state.shape)} {state.dtype} holds inputs: give {expected} {x.dtype}"
        )
    function = choose("short_conv.short_conv", IMPLEMENTATIONS, x, impl)
    tokens, silu = x.reshape(-1, x.shape[2]), activation == "silu"
    out, final_state = function(tokens, weight, bias, state, bounds, silu, output_final_state)
    return out.view(x.shape), final_state


def short_conv_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    activation: Literal["silu"] | None = None,
) -> torch.Tensor:
    """Convolve one token and add it to `state`, in place (decoding).

    Args:
        x: [B, C].
        weight: [C, K]; bias [C] or None.
        state: [B, C, K - 1] in the dtype of x, the latest input last; overwritten.
        activation: applied to the sum.

    Returns:
        [B, C] in the dtype of x.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(x[:, None].shape, weight, bias, activation)
    if state.shape != (*x.shape, weight.shape[1] - 1):
        raise ValueError(
            f"state {tuple(state.shape)} must be {(*x.shape, weight.shape[1] - 1)}, [B, C, K - 1]"
        )
    window = torch.cat([state, x[..., None]], -1)
    state.copy_(window[..., 1:])
    wide = torch.promote_types(x.dtype, torch.float32)
    out = (window.to(wide) * weight).sum(-1)
    out = out if bias is None else out + bias
    return (torch.nn.functional.silu(out) if activation else out).to(x.dtype)


def _check(
    shape: torch.Size, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> None:
    B, T, C = shape
    if weight.dim() != 2 or len(weight) != C or not 2 <= weight.shape[1] <= MAX_KERNEL_SIZE:
        raise ValueError(
            f"weight {tuple(weight.shape)} must be [C, K] with C={C} of x and K from 2 to "
            f"{MAX_KERNEL_SIZE}"
        )
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias {tuple(bias.shape)} must be [C] with C={C} of x")
    if activation not in (None, "silu"):
        raise ValueError(f'activation={activation!r} must be "silu" or None')
    if B * T == 0:
        raise ValueError(f"x {tuple(shape)} holds no token; T must be 1 at least")


def _find_bounds(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[int]:
    """Return where documents begin and end in the flattened tokens; a row is a document."""
    B, T = x.shape[:2]
    if cu_seqlens is None:
        return list(range(0, B * T + 1, T))
    bounds: list[int] = cu_seqlens.tolist()
    if B != 1:
        raise ValueError(f"cu_seqlens needs packed input with B=1, not B={B}")
    if bounds[:1] != [0] or bounds[-1] != T or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens={bounds} must rise from 0 to the {T} tokens of x")
    return bounds
