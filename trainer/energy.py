"""Energy of spiking projections by the model of arXiv:2509.05276, section 2 of the reference."""

from trainer.spike_observer import SpikeObserver

FP16_MAC, INT8_MAC, INT8_ADD = 1.5, 0.23, 0.03
"""pJ of one operation."""

PUBLISHED_MAC = 0.034
"""pJ of a spiking multiply-accumulate in the report, at 1.13 spikes per channel."""

ASSUMPTIONS = (
    f"Energy is a model, not a measurement: at 45 nm an FP16 MAC takes {FP16_MAC} pJ, an INT8 MAC "
    f"{INT8_MAC} pJ, an INT8 addition {INT8_ADD} pJ (arXiv:2509.05276). A spiking MAC is an INT8 "
    "addition for every spike of its input channel; shifts and all memory traffic cost nothing. "
    "Only projections inside the layers count: no head, norms, attention products or states. "
    "Inputs that are not spiked cost FP16 MACs, or INT8 ones with INT8 weights. The report has "
    f"{PUBLISHED_MAC} pJ, 43.5x below FP16 and 6.8x below INT8."
)


def energy_per_mac(mean_spikes: float) -> float:
    """Return the pJ of a multiply-accumulate whose input has so many spikes on average."""
    return mean_spikes * INT8_ADD


def mean_energy(seen: SpikeObserver) -> float:
    """Return the mean pJ of all multiply-accumulates that an observer saw."""
    spiking = sum(
        counts.macs * energy_per_mac(counts.statistics()["mean_spikes"])
        for counts in seen.inputs.values()
    )
    dense = FP16_MAC * seen.dense_macs + INT8_MAC * seen.integer_macs
    return (spiking + dense) / max(1.0, seen.macs)
