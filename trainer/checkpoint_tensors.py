"""Tensors of a checkpoint by name, from several files; a tensor may be in parts.

Who holds a part of the first dimension of a tensor writes it under `rows_name`. Who reads need not
know how it was cut.
"""

import re
from collections.abc import Iterable, Iterator, KeysView
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from parallel.layout import Segment

_ROWS = re.compile(r"(.+)\[(\d+):(\d+)\]")


class CheckpointDamaged(ValueError):  # noqa: N818 (says what is so)
    """A checkpoint is not what was written; names the file and what is wrong with it."""


def rows_name(name: str, rows: Segment) -> str:
    """Return the name under which a shard holds rows of the tensor `name`."""
    return f"{name}[{rows.start}:{rows.stop}]"


class _Part(NamedTuple):
    rows: Segment
    shard: Path
    key: str


class CheckpointTensors:
    """The tensors of several shards by name, on the CPU; only `get` reads one.

    Attributes:
        shapes: of the whole tensors.

    Raises:
        CheckpointDamaged: a tensor is in two shards, or rows of one are missing or of another size.
    """

    def __init__(self, shards: Iterable[Path]) -> None:
        self.shapes: dict[str, torch.Size] = {}
        self._parts: dict[str, list[_Part]] = {}
        for shard in shards:
            self._open(shard)
            for key in self._handle.keys():  # noqa: SIM118 (no mapping)
                self._add(key, shard, list(self._handle.get_slice(key).get_shape()))
        for name, parts in self._parts.items():
            parts.sort(key=lambda part: part.rows.start)
            stop = 0
            for part in parts:
                if part.rows.start != stop:
                    raise CheckpointDamaged(
                        f"{part.shard}: {part.key!r} does not go on where {name!r} stops, at row "
                        f"{stop}"
                    )
                stop = part.rows.stop
            if len(parts) > 1:
                self.shapes[name] = torch.Size([stop, *self.shapes[name][1:]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def keys(self) -> KeysView[str]:
        """Return the names shard by shard, the order in which reading is cheapest."""
        return self._parts.keys()

    def get(self, name: str, rows: Segment | None = None) -> torch.Tensor:
        """Read one tensor, or these rows of it.

        Raises:
            ValueError: no shard holds the name, or it has no such rows.
        """
        if name not in self._parts:
            raise ValueError(f"no shard holds {name!r}; there are {len(self._parts)} other names")
        if rows is None:
            pieces = [self._handle_of(p).get_tensor(p.key) for p in self._parts[name]]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        count = self.shapes[name][0]
        if rows.stop > count:
            raise ValueError(f"{name!r} has {count} rows, not {rows.start} to {rows.stop}")
        pieces = []
        for part in self._parts[name]:
            here = part.rows & rows
            if len(here):
                here = here.shift(-part.rows.start)
                pieces.append(self._handle_of(part).get_slice(part.key)[here.start : here.stop])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _add(self, key: str, shard: Path, shape: list[int]) -> None:
        match = _ROWS.fullmatch(key)
        name = match[1] if match else key
        rows = Segment(int(match[2]), int(match[3])) if match else Segment(0, *shape[:1] or [1])
        if match and [len(rows)] != shape[:1]:
            raise CheckpointDamaged(f"{shard}: {key!r} has shape {shape}, not {len(rows)} rows")
        parts = self._parts.setdefault(name, [])
        for part in parts:
            if part.key == key or len(part.rows & rows):
                raise CheckpointDamaged(f"{shard}: {key!r} is also in {part.shard}")
        parts.append(_Part(rows, shard, key))
        self.shapes[name] = torch.Size(shape)

    def _handle_of(self, part: _Part) -> "safe_open":
        if part.shard != self._opened:
            self._open(part.shard)
        return self._handle

    def _open(self, shard: Path) -> None:
        try:
            self._opened, self._handle = shard, safe_open(shard, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointDamaged(f"{shard}: {error}") from error
