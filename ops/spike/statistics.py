"""What a histogram of spike counts says (section 2 of the reference numbers in the README)."""

import torch


def spike_statistics(histogram: torch.Tensor, num_steps: int = 3) -> dict[str, float | list[float]]:
    """Summarize a histogram of |count|.

    Args:
        histogram: [max_count + 1] occurrences of each |count|, as `ops.spike.spike_histogram`
            returns them.
        num_steps: time steps that the spikes of a count are spread over.

    Returns:
        share_silent; mean_spikes, E[popcount |s|]; sparsity 1 - E[popcount |s|] / num_steps, over
        all counts and over counts within 7; share_within_7; share_above_16; and the shares of
        |s| = 0..15 and of 16 and more.

    Raises:
        ValueError: num_steps is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1; counts within 7 take 3")
    histogram = histogram.double().cpu()
    share = histogram / histogram.sum().clamp(min=1)
    popcount = torch.tensor([n.bit_count() for n in range(len(share))], dtype=torch.float64)
    mean_spikes = float(share @ popcount)
    within = share[:8]
    within_spikes = float(within @ popcount[: len(within)] / within.sum().clamp(min=1e-12))
    return {
        "share_silent": float(share[0]),
        "mean_spikes": mean_spikes,
        "sparsity_all": 1 - mean_spikes / num_steps,
        "sparsity_within_7": 1 - within_spikes / num_steps,
        "share_within_7": float(within.sum()),
        "share_above_16": float(share[17:].sum()),
        "histogram": [*share[:16].tolist(), float(share[16:].sum())],
    }
