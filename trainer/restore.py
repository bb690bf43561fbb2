"""A trained model from a run directory or one of its checkpoints, outside of training."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from conf.schema import Config, SpikeConfig, build
from models.causal_lm import CausalLM
from models.quantize import apply_quantization
from trainer.checkpoint import resolve
from trainer.model_state import load_weights


class Restored(NamedTuple):
    config: Config
    model: CausalLM
    checkpoint: Path


def find_run(path: str) -> tuple[Config, Path]:
    """Return the config of a run and one of its checkpoints, every byte of which was read.

    Args:
        path: a run directory (its newest sound checkpoint) or a checkpoint.

    Raises:
        ValueError: there is no sound checkpoint, or no config.yaml beside it.
    """
    checkpoint = resolve(path)
    return config_of(checkpoint), checkpoint


def config_of(checkpoint: Path) -> Config:
    """Return the config of the run that a checkpoint is of.

    Raises:
        ValueError: there is no config.yaml beside it.
    """
    run = checkpoint.parent.parent
    file = run / "config.yaml"
    if not file.exists():
        raise ValueError(f"run={run}: {file} is missing; name a run directory of longaxon train")
    return build(Config, yaml.safe_load(file.read_text()))


def has_integers(checkpoint: Path) -> bool:
    """Return whether a checkpoint is of a run in INT8."""
    file = checkpoint.parent.parent / "config.yaml"
    return file.exists() and config_of(checkpoint).quantization is not None


def restore_model(path: str, device: torch.device, *, spike: SpikeConfig | None = None) -> Restored:
    """Build the model of a run and load its weights; see `find_run`.

    Args:
        spike: spiking in place of the run's.
    """
    config, checkpoint = find_run(path)
    if spike is not None:
        config = dataclasses.replace(config, spike=spike)
    model = CausalLM(
        config.model, config.spike, config.ops, dtype=getattr(torch, config.dtype)
    ).eval()
    if config.quantization is not None:
        apply_quantization(model, config.quantization)
    load_weights(model, checkpoint)
    return Restored(config, model.to(device), checkpoint)
