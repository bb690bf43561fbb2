"""A training run, complete."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from conf.schema.base import (
    STRICT,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Ratio,
)
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig, SpikeConfig
from conf.schema.system import AcceleratorConfig, LauncherConfig, OpsConfig, ParallelConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    name: str
    """Name of the experiment; the default run directory starts with it."""
    dir: str | None
    """Run directory; null: `runs/<name>-<time>`."""
    steps: PositiveInt
    """Optimizer steps of the whole run."""
    seed: NonNegativeInt
    """Seed of the initialisation and of the order of the samples."""
    resume: str
    """auto: continue from the newest complete checkpoint; never; or the path of another run's
    checkpoint to start from while this run has none."""
    log_every: PositiveInt
    """Steps between two plain log lines (metrics.jsonl has every step)."""
    num_threads: NonNegativeInt
    """Threads a rank computes with on a CPU; 0: the cores divided by the ranks on this host."""
    max_nonfinite_steps: PositiveInt
    """Steps in a row without a finite loss and gradient that end the run with exit code 3."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    lr: NonNegativeFloat
    betas: Annotated[list[Ratio], Field(min_length=2, max_length=2)]
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    """Decoupled; not applied to norms and biases."""
    max_grad_norm: PositiveFloat
    """Gradients are scaled down to this global L2 norm."""
    schedule: Literal["constant", "cosine", "wsd"]
    warmup_steps: NonNegativeInt
    decay_steps: NonNegativeInt
    """Length of the last, linear part of wsd (warm-up, stable, decay)."""
    min_lr_ratio: Ratio
    """Final learning rate as a share of `lr`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    every: PositiveInt
    """Steps between two checkpoints; the last step always has one."""
    keep: PositiveInt
    """Complete checkpoints kept."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    every: PositiveInt
    """Steps between two evaluations; the last step always has one."""
    max_sequences: PositiveInt
    """Validation sequences, the same ones each time."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackingConfig:
    mlflow: bool
    uri: str | None
    """MLflow tracking URI; null: sqlite in mlflow.db beside the run directories."""
    experiment: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """A training run, complete: what `config.yaml` of a run directory holds."""

    run: RunConfig
    launcher: LauncherConfig
    accelerator: AcceleratorConfig
    dtype: Literal["auto", "float32", "bfloat16"]
    """Compute dtype. auto: bfloat16 where the device multiplies it faster, else float32."""
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    ops: OpsConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    spike: SpikeConfig
    tracking: TrackingConfig
