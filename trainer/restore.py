"""A trained model from a run directory or one of its checkpoints, outside of training."""

from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from conf.schema import Config, build
from models.causal_lm import CausalLM
from trainer.checkpoint import resolve, verify
from trainer.model_state import load_weights


class Restored(NamedTuple):
    config: Config
    model: CausalLM
    checkpoint: Path


def restore_model(path: str, device: torch.device) -> Restored:
    """Build the model of a run and load its weights.

    Args:
        path: a run directory (its newest sound checkpoint) or a checkpoint.

    Raises:
        ValueError: there is no sound checkpoint, or no config.yaml beside it.
    """
    checkpoint = resolve(path)
    verify(checkpoint)
    run_dir = checkpoint.parent.parent
    file = run_dir / "config.yaml"
    if not file.exists():
        raise ValueError(f"run={path}: {file} is missing; name a run directory of longaxon train")
    config = build(Config, yaml.safe_load(file.read_text()))
    model = CausalLM(
        config.model, config.spike, config.ops, dtype=getattr(torch, config.dtype)
    ).eval()
    load_weights(model, checkpoint)
    return Restored(config, model.to(device), checkpoint)
