"""Opens checkpoints of others: folders in Hugging Face's layout, and GGUF files."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from conf.schema import ModelConfig, OpsConfig, SpikeConfig
from models.causal_lm import CausalLM
from models.io import gla_swa, transformers_config
from models.io.gguf_file import GGUFFile
from models.io.names import GLA_SWA, TRANSFORMERS, Naming
from models.io.safetensors_folder import SafetensorsFolder
from models.io.tokenizer_files import copy_files, write_gguf_tokenizer

_PACKAGE = "pkg://"


class TensorSource(Protocol):
    """Tensors of a file or folder by the names of Transformers."""

    shapes: dict[str, torch.Size]

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor."""


class ForeignTensors:
    """The tensors of another's checkpoint by our names; only `get` reads one.

    Attributes:
        shapes: of every tensor.
    """

    def __init__(self, source: TensorSource, names: dict[str, str]) -> None:
        self.shapes = {name: source.shapes[theirs] for name, theirs in names.items()}
        self._source, self._names = source, names

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor in float32."""
        return self._source.get(self._names[name]).float()


@dataclass(frozen=True)
class Foreign:
    """A checkpoint of others.

    Attributes:
        config: its architecture.
        tensors: its weights by our names.
        values: its config.json, or what would stand there.
    """

    config: ModelConfig
    tensors: ForeignTensors
    values: dict[str, Any]
    _source: GGUFFile | Path

    def save_tokenizer(self, folder: Path) -> None:
        """Write tokenizer, chat template, generation settings and config.json into a folder."""
        if isinstance(self._source, GGUFFile):
            write_gguf_tokenizer(self._source, folder)
        else:
            copy_files(self._source, folder)
        (folder / "config.json").write_text(json.dumps(self.values, indent=2) + "\n")


def is_foreign(path: str) -> bool:
    """Return whether `read_foreign` is who reads this path."""
    if path.startswith(_PACKAGE) or path.endswith(".gguf"):
        return True
    return (Path(path).expanduser() / "config.json").is_file()


def read_foreign(path: str) -> Foreign:
    """Open a checkpoint of others; no weight is read yet.

    Args:
        path: a folder with config.json and safetensors files, a .gguf file, or
            pkg://<package>/<file or folder> for what an installed package holds.

    Raises:
        ValueError: there is none, our layers cannot express it, or tensors are unknown, missing or
            wrongly shaped, which are listed.
    """
    found = _find(path)
    file = GGUFFile(found) if found.is_file() else None
    values = file.config() if file else read_json(found / "config.json")
    source: TensorSource = file or SafetensorsFolder(found)
    config, naming = read_config(values)
    names = _match(path, source, config, naming)
    return Foreign(config, ForeignTensors(source, names), values, file or found)


def read_config(values: dict[str, Any]) -> tuple[ModelConfig, Naming]:
    """Return our config of what a config.json describes, and how its tensors are named.

    Raises:
        ValueError: the architecture is none of those that are read, or has what we do not.
    """
    model_type = values.get("model_type")
    if model_type in transformers_config.FAMILIES:
        return transformers_config.read_config(values), TRANSFORMERS
    if model_type == gla_swa.MODEL_TYPE:
        return gla_swa.read_config(values), GLA_SWA
    known = ", ".join((*transformers_config.FAMILIES, gla_swa.MODEL_TYPE))
    raise ValueError(f"config.json has model_type={model_type!r}; {known} are read")


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Return the shapes of a model's parameters by our names, in the model's order."""
    with torch.device("meta"):
        model = CausalLM(config, SpikeConfig(enabled=False, k=3.0), OpsConfig())
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _find(path: str) -> Path:
    found = Path(path).expanduser()
    if path.startswith(_PACKAGE):
        package, _, rest = path.removeprefix(_PACKAGE).partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"{path}: no package {package!r} is installed; pip install it first")
        found = Path(spec.submodule_search_locations[0]) / rest
    if not found.exists():
        raise ValueError(f"{path}: there is no {found}")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds; ValueError if it does not."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is no JSON object")
    return values


def _match(path: str, source: TensorSource, config: ModelConfig, naming: Naming) -> dict[str, str]:
    """Return their names by ours; ValueError unless both have the same tensors."""
    expected = parameter_shapes(config)
    names = naming.translate(expected)
    theirs = {names[name]: shape for name, shape in expected.items()}
    unknown = [name for name in source.shapes if name not in theirs]
    # Old checkpoints hold the frequencies of the rotary embedding, and tied heads again.
    unknown = [name for name in unknown if not name.endswith(".rotary_emb.inv_freq")]
    embed, head = names["embed.weight"], "lm_head.weight"
    are_there = {embed, head} <= source.shapes.keys()
    if config.tie_embeddings and are_there and torch.equal(source.get(head), source.get(embed)):
        unknown.remove(head)
    missing = [name for name in theirs if name not in source.shapes]
    wrong = [
        f"{name} {list(source.shapes[name])} instead of {list(shape)}"
        for name, shape in theirs.items()
        if name in source.shapes and source.shapes[name] != shape
    ]
    kinds = {"unknown": unknown, "missing": missing, "wrongly shaped": wrong}
    if any(kinds.values()):
        found = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
        raise ValueError(f"{path} does not hold the tensors of its config; {'; '.join(found)}")
    return names
