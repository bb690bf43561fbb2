"""Short convolution over a sequence on several ranks: the taps before a segment come by halo."""

from typing import Literal

import torch

from ops.short_conv import short_conv as short_conv_op
from parallel.sequence.blocks import window_spans
from parallel.sequence.context import SequenceContext
from parallel.sequence.halo import fetch_halo


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    context: SequenceContext,
    *,
    activation: Literal["silu"] | None = None,
) -> torch.Tensor:
    """Convolve each channel with its own K taps inside each document.

    Every rank of the sequence axis must call. The first `context.num_sinks` rows stand before every
    document.

    Args:
        x: [1, S + T, C], the sinks' rows and this rank's tokens.
        weight: [C, K].
        bias: [C] or None.
        activation: applied to the sum.

    Returns:
        [1, S + T, C] in the dtype of x.
    """
    layout, taps = context.layout, weight.shape[1] - 1
    impl = context.ops.short_conv
    sinks, x = context.split(x)
    outs, begin = [], x.new_zeros(1, taps, x.shape[2])
    if context.num_sinks:
        out_sinks, state = short_conv_op(
            sinks, weight, bias, output_final_state=True, activation=activation, impl=impl
        )
        assert state is not None, "the final state was asked for"
        outs, begin = [out_sinks], state.mT
    halos: list[torch.Tensor] = []
    if layout.sp_size > 1:
        spans = window_spans(layout, layout.sp_rank, taps + 1)
        (halo,) = fetch_halo((x,), context, taps + 1)
        halos = list(halo.split([len(span) for span in spans], dim=1))
    states = []
    for index, pieces in enumerate(layout.pieces):
        before = torch.cat([begin, halos[index]], dim=1)[:, -taps:] if halos else begin
        states += [before, *[begin] * (len(pieces) - 1)]
    out, _ = short_conv_op(
        x,
        weight,
        bias,
        state=torch.cat(states).mT,
        cu_seqlens=layout.cu_seqlens,
        activation=activation,
        impl=impl,
    )
    return torch.cat([*outs, out], dim=1) if outs else out
