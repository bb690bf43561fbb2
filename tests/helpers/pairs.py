"""Few rows that stand for the product of several axes."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def all_pairs(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return rows in which every two values of different axes meet at least once.

    Each row starts from the first pair that has not met and takes, axis by axis, the value that
    brings most new pairs.
    """
    names, sizes = list(axes), [len(values) for values in axes.values()]
    missing = {
        ((a, i), (b, j)): None  # a dict keeps the order
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(sizes[a])
        for j in range(sizes[b])
    }
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for axis in range(len(names)):
            if axis not in row:
                gains = [_count_new(row | {axis: i}, missing) for i in range(sizes[axis])]
                row[axis] = gains.index(max(gains))
        for pair in itertools.combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        rows.append({names[axis]: axes[names[axis]][i] for axis, i in sorted(row.items())})
    return rows


def _count_new(row: dict[int, int], missing: Mapping[Any, None]) -> int:
    return sum(pair in missing for pair in itertools.combinations(sorted(row.items()), 2))
