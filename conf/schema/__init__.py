"""Typed configuration: one frozen dataclass per section of a run's config.

Hydra composes YAML groups into a plain tree; `Config` gives every leaf its type, range and
meaning. Anything unknown, mistyped or out of range raises pydantic's ValidationError, which the
command turns into one line and exit code 2. Checks across sections live in `trainer.checks`.
"""

from conf.schema.adapters import AdaptersConfig
from conf.schema.base import (
    STRICT,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Ratio,
    StageError,
    build,
    extension,
)
from conf.schema.data import DataConfig
from conf.schema.model import (
    FFNConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    RopeScaling,
    SpikeConfig,
)
from conf.schema.objective import ObjectiveConfig
from conf.schema.quantization import QuantizationConfig
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
    InspectConfig,
    PatternConfig,
    QuantizeConfig,
    ReportConfig,
)

__all__ = [
    "STRICT",
    "AcceleratorConfig",
    "AdaptersConfig",
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
    "InspectConfig",
    "LauncherConfig",
    "LayerConfig",
    "MoEConfig",
    "ModelConfig",
    "NonNegativeFloat",
    "NonNegativeInt",
    "ObjectiveConfig",
    "OpsConfig",
    "OptimConfig",
    "ParallelConfig",
    "PatternConfig",
    "PositiveFloat",
    "PositiveInt",
    "QuantizationConfig",
    "QuantizeConfig",
    "Ratio",
    "ReportConfig",
    "RopeScaling",
    "RunConfig",
    "SpikeConfig",
    "StageError",
    "TrackingConfig",
    "build",
    "extension",
]
