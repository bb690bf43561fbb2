"""Short convolution by one depthwise convolution over all documents, each after its state.

Rows of channels are the memory format "channels last", for which libraries have fast kernels.
The convolution also gives K - 1 rows at each boundary that mix two documents; they are dropped.
"""

import torch
import torch.nn.functional as F


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    bounds: list[int],
    silu: bool,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `ops.short_conv.short_conv`; tensors as in `reference`."""
    C, K = weight.shape
    num_docs = len(bounds) - 1
    lengths = [bounds[n + 1] - bounds[n] for n in range(num_docs)]
    if state is None:
        state = x.new_zeros(1, C, K - 1).expand(num_docs, -1, -1)
    # Cutting with `split` and `unbind` makes each gradient in one pass.
    docs, before = x.split(lengths), state.transpose(1, 2).unbind(0)
    padded = torch.cat([part for pair in zip(before, docs, strict=True) for part in pair])

    image = padded[None, :, None].permute(0, 3, 1, 2)  # [1, C, rows, 1]
    kernel = weight.to(x.dtype).view(C, 1, K, 1)
    out = F.conv2d(image, kernel, None if bias is None else bias.to(x.dtype), groups=C)
    out = out[0, :, :, 0].t()  # [rows - (K - 1), C]
    if num_docs > 1:
        parts = out.split([size for n in lengths for size in (n, K - 1)][:-1])
        out = torch.cat(parts[::2])
    out = F.silu(out) if silu else out

    final_state = None
    if output_final_state:
        parts = padded.split([size for n in lengths for size in (n, K - 1)])
        final_state = torch.stack(parts[1::2]).transpose(1, 2)
    return out, final_state
