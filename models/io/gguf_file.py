"""A GGUF file of the Llama, Qwen2 or Qwen3 architecture, read as a checkpoint of Transformers.

llama.cpp stores each head of Llama's q and k with the two halves of its channels interleaved, and
weights in blocks of few bits with a scale; both are undone here, one tensor at a time.
"""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models.io.transformers_config import FAMILIES

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """Tensors by the names that Transformers has for them; only `get` reads one.

    Attributes:
        shapes: of every tensor, [out, in] as in PyTorch.
        metadata: what the file says beside its tensors.

    Raises:
        ValueError: it is no GGUF file, of another architecture, or the package gguf is missing.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{path} needs the package gguf to be read; pip install gguf"
            ) from error
        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{path} cannot be read as GGUF: {error}") from error
        self.metadata = Metadata(reader)
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in _ARCHITECTURES:
            raise ValueError(
                f"{path} has general.architecture={self.architecture}; {', '.join(_ARCHITECTURES)} "
                "are read"
            )
        self._tensors = {_translate(tensor.name): tensor for tensor in reader.tensors}
        self._rope_factors = self._tensors.pop(_ROPE_FACTORS, None)
        # GGUF counts dimensions from the innermost one.
        self.shapes = {
            name: torch.Size(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self._heads = {
            "q_proj": self._value("attention.head_count"),
            "k_proj": self._value("attention.head_count_kv", self._value("attention.head_count")),
        }

    def config(self) -> dict[str, Any]:
        """Return the values that config.json would have.

        Raises:
            ValueError: a value is missing, or asks for what is not read.
        """
        if self._value("expert_count", 0) or self._value("attention.sliding_window", 0):
            raise ValueError("GGUF files with experts or a sliding window are not read")
        heads, size = self._heads["q_proj"], self._value("embedding_length")
        head_dim = self._value("attention.key_length", size // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._value(key, head_dim) != head_dim:
                raise ValueError(f"{key}={self._value(key)} is not the head dim {head_dim}")
        theta = float(self._value("rope.freq_base", 10000.0))
        ids = {
            f"{kind}_token_id": value
            for kind in ("bos", "eos")
            if (value := self.metadata.get(f"tokenizer.ggml.{kind}_token_id")) is not None
        }
        return {
            "architectures": [FAMILIES[self.architecture].architecture],
            "model_type": self.architecture,
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": size,
            "intermediate_size": self._value("feed_forward_length"),
            "num_hidden_layers": self._value("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._heads["k_proj"],
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._value("context_length"),
            # Stored in float32, of which the shortest decimal that gives it is meant.
            "rms_norm_eps": float(str(np.float32(self._value("attention.layer_norm_rms_epsilon")))),
            "rope_theta": theta,
            "rope_scaling": self._scaling(theta, head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            **ids,
        }

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor in float32."""
        tensor = _dequantize(self._tensors[name])
        kind = name.split(".")[-2]
        if self.architecture != "llama" or kind not in self._heads:
            return tensor
        halves = tensor.unflatten(0, (self._heads[kind], -1, 2))
        return halves.transpose(1, 2).reshape(tensor.shape)

    def _value(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ValueError(f"the GGUF file lacks {self.architecture}.{key}")
        return value

    def _scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        """Return the scaling of the rotary embedding as config.json has it."""
        kind = self._value("rope.scaling.type", "none")
        if kind == "linear":
            return {"rope_type": "linear", "factor": float(self._value("rope.scaling.factor"))}
        if kind != "none":
            raise ValueError(f"rope.scaling.type={kind} of GGUF files is not read; linear is")
        if self._rope_factors is None:
            return None
        # Of Llama 3's scaling the file holds the outcome alone, a divisor for each frequency.
        stored = _dequantize(self._rope_factors)
        factor = float(stored.max())
        scaling = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
        frequency = theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
        kept = ((8192 * frequency / (2 * math.pi) - 1) / 3).clamp(0, 1)
        if not torch.allclose(1 / (kept + (1 - kept) / factor), stored.double(), rtol=1e-4):
            raise ValueError(f"{_ROPE_FACTORS} is not the scaling of Llama 3.1 to 3.3")
        return scaling


class Metadata:
    """Values by key; lists are unpacked only when asked for."""

    def __init__(self, reader: "GGUFReader") -> None:
        self._fields = reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        return self._fields[key].contents() if key in self._fields else default


def _dequantize(tensor: "ReaderTensor") -> torch.Tensor:
    from gguf import dequantize

    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))


def _translate(name: str) -> str:
    """Return Transformers' name; one that is not known stays as it is."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        number, part, kind = match.groups()
        return f"model.layers.{number}.{_LAYER[part]}.{kind}" if part in _LAYER else name
    part, _, kind = name.partition(".")
    return f"{_TOP[part]}.{kind}" if part in _TOP else name
