"""A training run, complete."""

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from conf.schema.adapters import AdaptersConfig
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
from conf.schema.objective import ObjectiveConfig
from conf.schema.quantization import QuantizationConfig
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
    checkpoint to continue from while this run has none."""
    log_every: PositiveInt
    """Steps between two plain log lines (metrics.jsonl has every step)."""
    num_threads: NonNegativeInt
    """Threads a rank computes with on a CPU; 0: the cores divided by the ranks on this host."""
    max_nonfinite_steps: PositiveInt
    """Steps in a row without a finite loss and gradient that end the run with exit code 3."""
    init_from: str | None = None
    """Another run, or its checkpoint, whose weights this run begins with, at step 0 and without its
    moments; null: random ones."""


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
    lr_scale: dict[str, PositiveFloat] = field(default_factory=dict)
    """Regular expressions and the factor on the learning rate of the parameters in whose name each
    is found, the last one that is; as in {gk_proj|features: 10.0} for what is new."""

    def __post_init__(self) -> None:
        for pattern in self.lr_scale:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"lr_scale: {pattern!r} is no regular expression ({error})"
                ) from error


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
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    adapters: AdaptersConfig | None = None
    """Low-rank adapters that are trained in place of the weights; null: none."""
    quantization: QuantizationConfig | None = None
    """Integers that the weights are in; null: floating point, which alone can be trained."""
