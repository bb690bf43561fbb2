"""Configs composed from conf/, tiny models, a context of one rank and random packed batches."""

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from conf.schema import Config, ModelConfig, OpsConfig, SpikeConfig, build
from models.causal_lm import CausalLM
from parallel.layout import build_layout
from parallel.recompute import Recompute
from parallel.sequence import SequenceContext
from trainer.data import Batch

OPS = OpsConfig()

TINY = (
    "model=tiny",
    "+mixer@model.mixers.full=full_attention",
    "model.hidden_size=32",
    "model.vocab_size=40",
    "model.ffns.dense.intermediate_size=48",
    "model.init_std=0.1",
    "model.mixers.linear.num_heads=4",
    "model.mixers.linear.num_kv_heads=2",
    "model.mixers.linear.head_dim=8",
    "model.mixers.linear.gate_rank=4",
    "model.mixers.window.num_heads=4",
    "model.mixers.window.num_kv_heads=2",
    "model.mixers.window.head_dim=8",
    "model.mixers.window.window_size=5",
    "model.mixers.full.num_heads=4",
    "model.mixers.full.num_kv_heads=2",
    "model.mixers.full.head_dim=8",
)


def compose_tree(*overrides: str, config_name: str = "train") -> dict[str, Any]:
    """Compose conf/<config_name>.yaml with Hydra overrides into a plain tree."""
    with initialize_config_module("conf", version_base="1.3"):
        config = compose(config_name, overrides=list(overrides))
    tree = OmegaConf.to_container(config, resolve=True)
    assert isinstance(tree, dict)
    tree.pop("stages", None)  # of which each is a config
    return {str(key): value for key, value in tree.items()}


@functools.cache
def compose_config(*overrides: str) -> Config:
    """Compose and validate the config of a training run; configs are frozen, so made once."""
    return build(Config, compose_tree(*overrides))


def tiny_model_config(*layers: str, overrides: Sequence[str] = ()) -> ModelConfig:
    """Compose a model of 32 channels whose window holds 5 tokens.

    Args:
        layers: per layer its mixers among linear, window and full, joined by +.
        overrides: more Hydra overrides, such as model.tie_embeddings=false.
    """
    rows = ",".join(f"{{mixers:[{layer.replace('+', ',')}],ffn:dense}}" for layer in layers)
    shape = (f"model.layers=[{rows}]", f"model.num_layers={len(layers)}")
    return compose_config(*TINY, *shape, *overrides).model


def build_model(
    config: ModelConfig,
    *,
    spiking: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    recompute: str = "none",
) -> CausalLM:
    """Build a model and draw its weights."""
    spike = SpikeConfig(enabled=spiking, k=3.0)
    layers = Recompute(recompute)  # type: ignore[arg-type]
    model = CausalLM(config, spike, OPS, dtype=dtype, recompute=layers)
    model.reset_parameters(seed)
    return model


def one_rank_context(doc_lengths: Sequence[int], ops: OpsConfig = OPS) -> SequenceContext:
    """Return the context of a single rank that holds documents of these lengths."""
    cu_seqlens = torch.tensor([0, *accumulate(doc_lengths)], dtype=torch.int32)
    return SequenceContext(build_layout(cu_seqlens), ops)


def random_batch(doc_lengths: Sequence[int], vocab_size: int, seed: int = 0) -> Batch:
    """Pack random documents of these lengths; the last token of each predicts nothing."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (1, sum(doc_lengths)), generator=generator)
    cu_seqlens = torch.tensor([0, *accumulate(doc_lengths)], dtype=torch.int32)
    labels = tokens.roll(-1, 1)
    labels[:, cu_seqlens[1:].long() - 1] = -100
    return Batch(tokens, labels, cu_seqlens, float((labels >= 0).sum()))
