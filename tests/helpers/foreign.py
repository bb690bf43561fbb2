"""Tiny models of Transformers in folders, and imported models that compute."""

from pathlib import Path
from typing import Any

import torch
import transformers

from conf.schema import OpsConfig, SpikeConfig
from models.causal_lm import CausalLM
from models.io import Foreign, read_foreign
from parallel.layout import build_layout
from parallel.sequence import SequenceContext

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
"""Of tiny models; a head has more channels than its share of the hidden size."""
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
}  # fmt: skip
_GIVEN = {"attention_factor": 1.3, "beta_fast": 8.0, "factor": 2.0}
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
_MILLION = {"rope_type": "default", "rope_theta": 1e6}
_WINDOW = {"use_sliding_window": True, "sliding_window": 7}
_WINDOW_OUTSIDE = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": _LINEAR}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "mistral-yarn-given": ("mistral", {"rope_parameters": _YARN | _GIVEN, "sliding_window": None}),
    "mistral-window7": ("mistral", {"sliding_window": 7, "head_dim": None}),
    "qwen2": ("qwen2", {"head_dim": 12, "rope_parameters": _MILLION}),
    "qwen2-window7": ("qwen2", _WINDOW | {"head_dim": 12, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"num_key_value_heads": 1}),
    "qwen3-window7": ("qwen3", _WINDOW | {"layer_types": _WINDOW_OUTSIDE}),
}
"""A model type of Transformers with what differs from SHAPE, by a name for the case."""


def make_transformers(model_type: str, **config: Any) -> Any:
    """Return a random model of Transformers; biases and norms are random too."""
    torch.manual_seed(0)
    values = transformers.AutoConfig.for_model(model_type, **{**SHAPE, **config})
    values._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(values).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
    return model


def save_transformers(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB"
) -> Any:
    """Write a random model of FAMILIES with Transformers and return it."""
    model_type, config = FAMILIES[family]
    model = make_transformers(model_type, **config)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return model.float()


def build_imported(foreign: Foreign) -> CausalLM:
    """Build the model of a checkpoint and load all its weights."""
    model = CausalLM(foreign.config, SpikeConfig(enabled=False, k=3.0), OpsConfig()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(foreign.tensors.get(name))
    assert dict(model.named_parameters()).keys() == foreign.tensors.shapes.keys()
    return model


@torch.no_grad()
def imported_logits(path: str | Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits [T, vocab] that an imported model gives for one document [1, T]."""
    model = build_imported(read_foreign(str(path)))
    return model_logits(model, tokens)


@torch.no_grad()
def model_logits(model: CausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits [T, vocab] for one document [1, T]."""
    return model.head.logits(model.hidden(tokens, one_document(tokens.shape[1])))[0]


def one_document(num_tokens: int) -> SequenceContext:
    """Return the context of one rank that holds one document."""
    layout = build_layout(torch.tensor([0, num_tokens], dtype=torch.int32))
    return SequenceContext(layout, OpsConfig())
