"""Tensors of a checkpoint as if its adapters had been merged into the weights."""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from models.lora import add_product
from parallel.layout import Segment
from trainer.checkpoint import load_tensors
from trainer.checkpoint_tensors import CheckpointTensors

_MODEL, _ADAPTER = "model/", ".adapter."


def load_merged(checkpoint: Path) -> "MergedTensors":
    """Open the shards of a checkpoint, of whose adapters nothing is left to be seen."""
    return MergedTensors(load_tensors(checkpoint))


class MergedTensors:
    """What `CheckpointTensors` gives; weights have their adapters in them.

    Args:
        tensors: of a checkpoint.
        kept: adapters that stay what they are, by name, as in layers.0.ffn.up_proj.adapter.
    """

    def __init__(self, tensors: CheckpointTensors, kept: Collection[str] = ()) -> None:
        self._tensors = tensors
        self._adapters = {
            f"{name.removesuffix('.adapter.a')}.weight": name.removesuffix(".a")
            for name in tensors
            if name.startswith(_MODEL) and name.endswith(".adapter.a")
        }
        self._adapters = {
            weight: adapter
            for weight, adapter in self._adapters.items()
            if adapter.removeprefix(_MODEL) not in kept
        }
        merged = {f"{name}." for name in self._adapters.values()}
        self.shapes = {
            name: shape
            for name, shape in tensors.shapes.items()
            if name.partition(_ADAPTER)[0] + _ADAPTER not in merged
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def get(self, name: str, rows: Segment | None = None) -> torch.Tensor:
        """Read one tensor, or these rows of it; see `CheckpointTensors.get`."""
        found = self._tensors.get(name, rows)
        adapter = self._adapters.get(name)
        if adapter is None:
            return found
        a, b, scale = (self._tensors.get(f"{adapter}.{part}") for part in ("a", "b", "scale"))
        b = b if rows is None else b[rows.start : rows.stop]
        return add_product(found, a, b, float(scale))
