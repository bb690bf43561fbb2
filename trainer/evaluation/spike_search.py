"""A k for every kind of input: the sparsest counts within a budget of perplexity."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from conf.schema import SpikeConfig
from trainer.evaluation import Value
from trainer.spike_observer import InputCounts

TRIALS = 10
"""Settings that are tried, each of which halves the interval of prices that is left."""
CHEAPEST, DEAREST = 1e-3, 1e4
"""Ends of that interval: spikes per channel that a nat of loss is worth."""


class Measurement(Protocol):
    """What is known of a setting."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        ...

    @property
    def inputs(self) -> Mapping[str, InputCounts]:
        """Counts by the name of the input."""
        ...

    def row(self, k: str, dense_loss: float) -> dict[str, Value]:
        """Return a line of a table."""
        ...


Measure = Callable[[SpikeConfig], Measurement]


@dataclass(frozen=True)
class Found:
    """The setting that was found, on the text it was found on and on another one."""

    rows: list[dict[str, Value]]
    note: str


def find_setting(
    measure: Measure,
    measure_again: Measure,
    *,
    by: str,
    ladder: Sequence[float],
    max_ratio: float,
    target: float,
) -> Found:
    """Choose a k for every group of inputs such that perplexity stays within `max_ratio`.

    The loss is taken to rise by a sum over the groups of sensitivity times relative square error
    of rounding. The error is measured at every k, the sensitivity with each group spiking alone at
    the smallest k. Of every group the k is taken that has the fewest spikes above those of the
    target, plus a price times its share of the loss; the price is found by bisection, each trial
    being measured as a whole.

    Args:
        measure: on the text to search on.
        measure_again: on the text to try the result on.
        by: "kind", inputs of the same name in all layers have the same k; "input", each its own.
        ladder: what k an input can have, rising.
        target: sparsity over counts within 7 that spikes are held against.
    """
    off, least = SpikeConfig(enabled=False, k=ladder[0]), ladder[0]
    dense = measure(off).loss
    uniform = {k: measure(SpikeConfig(enabled=True, k=k)).inputs for k in ladder}
    groups = list(dict.fromkeys(name if by == "input" else kind(name) for name in uniform[least]))
    counts = {k: {g: together(inputs, g) for g in groups} for k, inputs in uniform.items()}
    sensitivity = {}
    for group in groups:
        alone = SpikeConfig(enabled=True, k=least, k_by_input={"*": None, group: least})
        rise = max(0.0, measure(alone).loss - dense)
        sensitivity[group] = rise / max(counts[least][group].relative_error ** 2, 1e-12)
    channels = float(sum(found.histogram.sum() for found in counts[least].values()))

    def choose(price: float) -> SpikeConfig:
        def cost(group: str, k: float) -> float:
            found = counts[k][group]
            rise = sensitivity[group] * found.relative_error**2
            return _excess(found, target) / channels + price * rise

        return _setting({group: min(ladder, key=lambda k: cost(group, k)) for group in groups})

    low, high = math.log(CHEAPEST), math.log(DEAREST)
    best = choose(DEAREST)
    for _ in range(TRIALS):
        middle = (low + high) / 2
        trial = choose(math.exp(middle))
        if measure(trial).loss - dense <= math.log(max_ratio):
            best, high = trial, middle
        else:
            low = middle
    rows = [
        measured(best).row("found", measured(off).loss) | {"source": text}
        for text, measured in (("searched on", measure), ("held out", measure_again))
    ]
    others = ",".join(f"{name}:{k:g}" for name, k in (best.k_by_input or {}).items())
    return Found(rows, f"Found: spike={{enabled:true,k:{best.k:g},k_by_input:{{{others}}}}}")


def kind(name: str) -> str:
    """Return a pattern for the inputs that have this name in all layers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def together(inputs: Mapping[str, InputCounts], pattern: str = "*") -> InputCounts:
    """Return the counts of all inputs that match a pattern."""
    total = InputCounts()
    for name, counts in inputs.items():
        if fnmatchcase(name, pattern):
            total.add(counts)
    return total


def _excess(counts: InputCounts, target: float) -> float:
    """Return the spikes of counts within 7 above those that `target` allows them."""
    few = counts.histogram[:8]
    return sum(float(few[n]) * (n.bit_count() - 3 * (1 - target)) for n in range(8))


def _setting(chosen: Mapping[str, float]) -> SpikeConfig:
    """Return it with the most frequent k in front, so that only the others are listed."""
    values = list(chosen.values())
    usual = max(sorted(set(values)), key=values.count)
    others: dict[str, float | None] = {g: k for g, k in chosen.items() if k != usual}
    return SpikeConfig(enabled=True, k=usual, k_by_input=others)
