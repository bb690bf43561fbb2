"""Definition of the short convolution: document by document, tap by tap."""

import itertools

import torch


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    bounds: list[int],
    silu: bool,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `ops.short_conv.short_conv`; differentiable by autograd.

    Args:
        x: [tokens, C] of all documents.
        bounds: where they begin and end.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    C, K = weight.shape
    outs, final_states = [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        before = x.new_zeros(K - 1, C) if state is None else state[n].t()
        inputs = torch.cat([before, x[start:end]]).to(wide)
        taps = [inputs[j : j + end - start] * weight[:, j].to(wide) for j in range(K)]
        out = torch.stack(taps).sum(0)
        out = out if bias is None else out + bias.to(wide)
        outs.append(out * torch.sigmoid(out) if silu else out)
        final_states.append(inputs[end - start :].t())
    final_state = torch.stack(final_states).to(x.dtype) if output_final_state else None
    return torch.cat(outs).to(x.dtype), final_state
