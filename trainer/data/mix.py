"""One stream of samples from one source, or from several in proportion to weights.

Which source a sample is of follows from its number alone, by Tijdeman's solution of the chairman
assignment problem (Discrete Mathematics 32, 1980): after any number of samples, that of each
source is off its share by less than one.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np

from conf.schema import DataConfig
from trainer.data.batches import Dataset, TokenDataset, Window
from trainer.data.shards import check_source, prepare

_MAX_PERIOD = 10**5


def check_data(config: DataConfig) -> None:
    """Raise ValueError if the section `data` cannot work; reads one record of a source at most."""
    for name, part in parts_of(config).items():
        with _naming(config, name):
            check_source(part)
    if config.mix is not None:
        schedule_of(tuple(part.weight for part in config.mix))


def prepare_data(config: DataConfig) -> dict[str, Path]:
    """Tokenise all sources unless that was done before; return the folders of their shards.

    Raises:
        ValueError: see `prepare`.
    """
    folders = {}
    for name, part in parts_of(config).items():
        with _naming(config, name):
            folders[name] = prepare(part)
    return folders


def open_data(config: DataConfig, split: str, seed: int) -> Dataset:
    """Return the samples of a split, tokenised before or now.

    Args:
        config: the section.
        split: train or val.
        seed: of the order of the samples.
    """
    folders, parts = prepare_data(config), parts_of(config)
    if split == "val" and config.validation is not None:
        parts = {config.validation: parts[config.validation]}
    if config.mix is None:
        (folder,) = folders.values()
        return TokenDataset(folder, split, config.seq_len, seed, config)
    datasets = [
        TokenDataset(folders[name], split, config.seq_len, _part_seed(seed, name), part, name)
        for name, part in parts.items()
    ]
    weights = tuple(part.weight for part in config.mix if part.name in parts)
    return MixedDataset(datasets, schedule_of(weights))


@dataclass(frozen=True)
class Schedule:
    """Which source each sample of a period is of; the period repeats."""

    part: np.ndarray
    """int64 [period]."""
    index: np.ndarray
    """int64 [period]: how many samples of the same source came before in the period."""
    counts: np.ndarray
    """int64 [num_parts]: samples of each source in a period."""

    def locate(self, number: int) -> tuple[int, int]:
        """Return the source of a sample, and the number of the sample there."""
        periods, position = divmod(number, len(self.part))
        part = int(self.part[position])
        return part, int(periods * self.counts[part] + self.index[position])

    def count(self, number: int) -> list[int]:
        """Return how many of the first `number` samples are of each source."""
        periods, rest = divmod(number, len(self.part))
        inside = np.bincount(self.part[:rest], minlength=len(self.counts))
        counts: list[int] = (periods * self.counts + inside).tolist()
        return counts


class MixedDataset:
    """Samples of several sources in a fixed order; each source is shuffled by its own epochs."""

    def __init__(self, parts: Sequence[TokenDataset], schedule: Schedule) -> None:
        self.seq_len, self.vocab_size = parts[0].seq_len, parts[0].vocab_size
        self._parts, self._schedule = parts, schedule
        self.num_sequences = self._longest_spread()

    def sample(self, number: int) -> Window:
        """Return sample `number` of the run, 0 and up."""
        part, index = self._schedule.locate(number)
        return self._parts[part].sample(index)

    def spread(self, number: int, count: int) -> Window:
        """Return window `number` of `count`, of which each source has its share, evenly spread."""
        part, index = self._schedule.locate(number)
        return self._parts[part].spread(index, self._schedule.count(count)[part])

    def seen(self, consumed: int) -> list[str]:
        """Say of each source what of it a run has seen with so many samples."""
        counts = self._schedule.count(consumed)
        return [
            line
            for part, count in zip(self._parts, counts, strict=True)
            for line in part.seen(count)
        ]

    def _longest_spread(self) -> int:
        """Return how many windows have the weights and none twice; at least one."""
        shortest, longest = 1, 1 + sum(part.num_sequences for part in self._parts)
        while longest - shortest > 1:
            middle = (shortest + longest) // 2
            counts = self._schedule.count(middle)
            if all(n <= part.num_sequences for n, part in zip(counts, self._parts, strict=True)):
                shortest = middle
            else:
                longest = middle
        return shortest


def parts_of(config: DataConfig) -> dict[str, DataConfig]:
    """Return a section of its own for each source, by its name."""
    if config.mix is None:
        return {"data": config}
    return {
        part.name: replace(
            config,
            source=part.source,
            path=part.path,
            format=part.format,
            text_key=part.text_key,
            messages_key=part.messages_key,
            packing=part.packing or config.packing,
            too_long=part.too_long or config.too_long,
            mix=None,
            validation=None,
        )
        for part in config.mix
    }


@lru_cache(maxsize=4)
def schedule_of(weights: tuple[float, ...]) -> Schedule:
    """Return the order of sources in proportion to their weights.

    Raises:
        ValueError: the weights have so many digits that the order would repeat too late.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*shares)
    shares = [share // divisor for share in shares]
    period = sum(shares)
    if period > _MAX_PERIOD:
        rounded = [float(f"{1000 * share / period:.3g}") for share in shares]
        raise ValueError(
            f"data.mix: the weights {list(weights)} repeat after {period:,} samples, which is more "
            f"than {_MAX_PERIOD:,}; use weights of fewer digits, such as {rounded}"
        )
    part = _order(shares, period)
    index = np.zeros(period, np.int64)
    for i, share in enumerate(shares):
        index[part == i] = np.arange(share)
    return Schedule(part, index, np.array(shares))


def _order(shares: list[int], period: int) -> np.ndarray:
    """Return whose turn it is at each place of a period; each has as many as its share."""
    if len(shares) == 1:
        return np.zeros(period, np.int64)
    slack = 2 * len(shares) - 2
    order, due = np.zeros(period, np.int64), [0] * len(shares)
    for place in range(period):
        due = [d + share for d, share in zip(due, shares, strict=True)]
        # Of those that are due, the one whose debt would be the first to grow too large.
        deadlines = [
            ((slack - 1) * period - slack * d) / share for d, share in zip(due, shares, strict=True)
        ]
        chosen = min(
            (i for i, d in enumerate(due) if d * slack >= period),
            key=deadlines.__getitem__,
        )
        order[place] = chosen
        due[chosen] -= period
    return order


def _part_seed(seed: int, name: str) -> int:
    """Return the seed of a source's order: it depends on no other source."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6], "little")


@contextmanager
def _naming(config: DataConfig, name: str) -> Iterator[None]:
    """Say in errors of which part of a mix they are."""
    try:
        yield
    except ValueError as error:
        if config.mix is None:
            raise
        raise ValueError(f"data.mix, part {name!r}: {error}") from error
