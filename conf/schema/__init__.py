"""Typed configuration: one frozen dataclass per section of a run's config.

Hydra composes YAML groups into a plain tree; `Config` gives every leaf its type, range and
meaning. Anything unknown, mistyped or out of range raises pydantic's ValidationError, which the
command turns into one line and exit code 2. Checks across sections live in `trainer.checks`.
"""

from conf.schema.base import (
    STRICT,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Ratio,
    build,
    extension,
)
from conf.schema.data import DataConfig
from conf.schema.model import FFNConfig, LayerConfig, ModelConfig, MoEConfig, SpikeConfig
from conf.schema.system import (
    AcceleratorConfig,
    Implementation,
    LauncherConfig,
    OpsConfig,
    ParallelConfig,
)
from conf.schema.training import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
)
from conf.schema.verbs import (
    BenchConfig,
    ConvertConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ReportConfig,
)

__all__ = [
    "STRICT",
    "AcceleratorConfig",
    "BenchConfig",
    "CheckpointConfig",
    "Config",
    "ConvertConfig",
    "DataConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExportConfig",
    "FFNConfig",
    "GenerateConfig",
    "Implementation",
    "LauncherConfig",
    "LayerConfig",
    "MoEConfig",
    "ModelConfig",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpsConfig",
    "OptimConfig",
    "ParallelConfig",
    "PositiveFloat",
    "PositiveInt",
    "Ratio",
    "ReportConfig",
    "RunConfig",
    "SpikeConfig",
    "TrackingConfig",
    "build",
    "extension",
]
