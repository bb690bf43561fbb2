"""Tensors of a folder of safetensors files, in one file or in shards with an index."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16", "F64")


class SafetensorsFolder:
    """Tensors by the names in the files; only `get` reads one.

    Attributes:
        shapes: of every tensor.
        dtypes: as safetensors names them, of every tensor.

    Raises:
        ValueError: there are no such files, one is damaged or not what the index says, or a tensor
            holds no floating-point numbers.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, str] = {}
        self._handles: dict[str, safe_open] = {}
        expected = _index(folder)
        for file in _files(folder, expected):
            try:
                handle = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from error
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                self._handles[name] = handle
                part = handle.get_slice(name)
                self.shapes[name] = torch.Size(part.get_shape())
                self.dtypes[name] = part.get_dtype()
        if expected is not None and (odd := sorted(expected.keys() ^ self.shapes.keys())):
            raise ValueError(
                f"{folder / _INDEX} and its files do not hold the same tensors: {', '.join(odd)}"
            )
        if odd := [f"{n} ({d})" for n, d in self.dtypes.items() if d not in _DTYPES]:
            raise ValueError(
                f"{folder} holds tensors that are not {', '.join(_DTYPES)}: {', '.join(odd)}"
            )

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor as it is stored."""
        tensor: torch.Tensor = self._handles[name].get_tensor(name)
        return tensor


def _index(folder: Path) -> dict[str, str] | None:
    """Return the files by tensor, None without an index."""
    file = folder / _INDEX
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no index of safetensors files ({error})") from error


def _files(folder: Path, index: dict[str, str] | None) -> list[Path]:
    names = [_FILE] if index is None else sorted(set(index.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}; weights are read from safetensors files only, "
            "others can run code: save the model again with safe_serialization"
        )
    return [folder / name for name in names]
