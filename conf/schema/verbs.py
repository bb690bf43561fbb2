"""The other commands."""

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from conf.schema.base import (
    STRICT,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    extension,
)
from conf.schema.model import ModelConfig, SpikeConfig
from conf.schema.system import AcceleratorConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    run: str
    """Run directory, or one of its checkpoints."""
    suite: str
    """What to measure, one of `suites`."""
    suites: dict[str, Annotated[Any, extension("trainer.evaluation")]]
    """Settings of each suite, a config class of trainer/evaluation."""
    out: str | None = None
    """File for the rows as JSON, with figures beside it; null: print only."""
    spike: SpikeConfig | None = None
    """Spiking in place of the run's; null: as in the run."""

    def __post_init__(self) -> None:
        if self.suite not in self.suites:
            raise ValueError(f"suite={self.suite} is none of {', '.join(sorted(self.suites))}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GenerateConfig:
    run: str
    """Run directory, or one of its checkpoints."""
    prompt: str
    max_new_tokens: PositiveInt
    temperature: NonNegativeFloat
    """0 takes the likeliest token."""
    top_k: NonNegativeInt
    """Sample among this many likeliest tokens; 0: all."""
    seed: NonNegativeInt
    stop_at_end: bool
    """Stop where the model ends the document."""
    time_every: NonNegativeInt
    """Report milliseconds per token over every so many tokens on standard error; 0: do not."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReportConfig:
    run: str
    """Run directory."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExportConfig:
    run: str
    """Run directory, or one of its checkpoints."""
    out: str
    """Folder to write model.safetensors into."""
    dtype: Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ConvertConfig:
    run: str
    """Run directory, or one of its checkpoints."""
    model: ModelConfig
    """What to make of it: the run's own model, but for FFNs that become mixtures of experts."""
    out: str
    """Run directory to write; absent or empty."""
    router_std: PositiveFloat
    """Standard deviation of the weights of new routers. Small: a token's experts start with even
    weights, as the factor of the experts presumes (eq. 18 of arXiv:2509.05276)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BenchConfig:
    suite: Literal["train_step", "ops", "sequence", "compile", "tune"]
    out: str | None
    """File for the JSON rows; null: print only."""
    operators: list[str]
    """Operators of the suites ops, compile and tune; none: all."""
    archs: list[Literal["sm_80", "sm_90", "sm_100", "gfx90a", "gfx942"]]
    """GPUs that the suites compile and tune build kernels for; they need not be there."""
    cases: str | None
    """Regular expression that a kernel of suite compile, as in "fwd.*bf16", or an algorithm of
    suite sequence must match."""
    max_peer_seq_len: PositiveInt
    """Longest sequence (tokens) at which suite ops times peers of quadratic cost."""
    repeats: Annotated[int, Field(ge=5)]
    """Timed repetitions of each side, in turn; the median counts."""
    num_threads: PositiveInt
    dtype: Literal["float32", "bfloat16"]
    seq_len: PositiveInt
    micro_batch_size: PositiveInt
    ranks: list[PositiveInt]
    """Numbers of ranks of suite sequence, beside one rank."""
    accelerator: AcceleratorConfig
    model: ModelConfig
