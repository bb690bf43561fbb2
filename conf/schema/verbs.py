"""The other commands."""

from dataclasses import field
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
from conf.schema.model import ModelConfig, MoEConfig, SpikeConfig
from conf.schema.quantization import QuantizationConfig
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
    chat: bool = False
    """The prompt is what the user says; the tokenizer's chat template puts it into the
    conversation that the model answers, and the answer alone is printed."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InspectConfig:
    run: str
    """Run directory, or one of its checkpoints."""
    prompt: str
    token: int
    """Index of a token of the prompt; negative: from its end."""
    layer: NonNegativeInt
    projection: str
    """Name of a projection in the layer, or the end of it that says which."""
    channels: PositiveInt
    """Input channels that are shown."""
    outputs: PositiveInt
    """Output channels that are shown."""
    spike: SpikeConfig | None = None
    """Spiking in place of the run's; null: as in the run."""


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
    format: Literal["auto", "huggingface", "gla_swa", "longaxon"] = "auto"
    """huggingface: as Transformers has Llama, Mistral, Qwen2 or Qwen3; gla_swa: as SpikingBrain-7B
    was published; longaxon: the weights alone under our names; auto: the first that can express the
    model."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PatternConfig:
    layers: list[Annotated[list[str], Field(min_length=1)]] | None = None
    """Mixers of each layer by name, repeated; `source` is the attention that the layers have; null:
    it stays everywhere."""
    keep_full: list[NonNegativeInt] = field(default_factory=list)
    """Layers, counted from 0, that have the mixers of `full` instead."""
    full: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: ["source"])
    window_size: PositiveInt | None = None
    """For mixers to refer to."""
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Mixers by name, each `_target_` a config class of models/mixers. Heads, head_dim, qkv_bias,
    qk_norm and the rotary embedding are the source's where nothing, or `source`, is given."""
    num_sinks: NonNegativeInt | None = None
    """Learned tokens before every document; null: as many as the source has."""
    sink_token: NonNegativeInt | None = None
    """New sinks begin as the embedding of this token, as of one that documents began with when the
    source was trained and that its attention rests on; null: random."""
    moe: MoEConfig | None = None
    """Experts that every dense FFN becomes; null: FFNs stay."""
    keep_dense: list[NonNegativeInt] = field(default_factory=list)
    """Layers, counted from 0, whose FFN stays dense."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ConvertConfig:
    source: str
    """Run directory, one of its checkpoints, a folder in Hugging Face's layout, a .gguf file, or
    pkg://<package>/<file> for one that an installed package holds."""
    model: ModelConfig | None = None
    """What to make of it, whole; null: what `pattern` makes of its own model."""
    pattern: PatternConfig = field(default_factory=PatternConfig)
    """Changes to its own model; none: it is imported as it is."""
    out: str
    """Run directory to write; absent or empty."""
    spike: dict[str, Any] = field(default_factory=dict)
    """Spiking of the new run; what is null stays as in the source."""
    router_std: PositiveFloat
    """Standard deviation of the weights of new routers. Small: a token's experts start with even
    weights, as the factor of the experts presumes (eq. 18 of arXiv:2509.05276)."""
    table: bool = False
    """Print where every tensor comes from, as conversion.json of the new run says."""

    def __post_init__(self) -> None:
        if self.model is not None and self.pattern != PatternConfig():
            raise ValueError(
                "model and pattern both say what to make of the source; leave out one of them"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QuantizeConfig:
    run: str
    """Run directory, or one of its checkpoints."""
    out: str
    """Run directory to write; absent or empty."""
    quantization: QuantizationConfig
    spike: SpikeConfig | None = None
    """Spiking in place of the run's; null: as in the run."""
    samples: PositiveInt
    """Training sequences of the run that scales are calibrated on."""
    seq_len: PositiveInt
    """Tokens of each."""
    max_sequences: PositiveInt
    """Validation sequences of the run that the table is measured on."""
    decoded_tokens: PositiveInt
    """Validation tokens that are decoded one by one, to see what a state in INT8 loses."""
    table: str | None = None
    """File for the rows of the table as JSON; null: print only."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BenchConfig:
    suite: Literal["train_step", "decode", "recall", "ops", "sequence", "compile", "tune"]
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
    """Longest sequence (tokens) at which suite ops times peers of quadratic cost, and suite decode
    the one that copies its cache at every token."""
    repeats: Annotated[int, Field(ge=5)]
    """Timed repetitions of each side, in turn; the median counts."""
    num_threads: PositiveInt
    dtype: Literal["float32", "bfloat16"]
    seq_len: PositiveInt
    micro_batch_size: PositiveInt
    ranks: list[PositiveInt]
    """Numbers of ranks of suite sequence, beside one rank."""
    contexts: list[PositiveInt] = field(default_factory=lambda: [1024, 16384])
    """Tokens before the ones that suite decode times."""
    run: str | None = None
    """Run directory, or one of its checkpoints, whose model, spiking and dtype suite decode takes
    in place of `model` and `dtype`."""
    accelerator: AcceleratorConfig
    model: ModelConfig
