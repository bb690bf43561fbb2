"""Typed configuration: one frozen dataclass per section of a run's config.

Hydra composes YAML groups into a plain tree; `Config` gives every leaf its type, range and
meaning. Anything unknown, mistyped or out of range raises pydantic's ValidationError, which the
command turns into one line and exit code 2. Checks across sections live in `trainer.checks`.
"""

import importlib
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass, is_pydantic_dataclass

STRICT = ConfigDict(strict=True, extra="forbid")

Section = TypeVar("Section")

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]


def build(cls: type[Section], tree: dict[str, Any]) -> Section:
    """Validate a plain tree against a config class.

    Raises:
        pydantic.ValidationError: every unknown, missing, mistyped or illegal key, with its path.
    """
    # In strict mode only JSON may stand for nested dataclasses.
    return TypeAdapter(cls).validate_json(json.dumps(tree))


def extension(package: str) -> BeforeValidator:
    """Build a config that an extension file defines and its YAML names by `_target_`.

    Only strict config dataclasses inside `package` are accepted, so that reading a config never
    runs foreign code.
    """

    def load(value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("_target_"), str):
            raise ValueError(f"needs a `_target_` naming a config class in {package}")
        module, _, name = value["_target_"].rpartition(".")
        if not module.startswith(package + "."):
            raise ValueError(f"_target_ {value['_target_']!r} is outside {package}")
        try:
            cls = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            if not module.startswith(str(error.name)):
                raise
            cls = None
        if not isinstance(cls, type) or not is_pydantic_dataclass(cls):
            raise ValueError(f"_target_ {value['_target_']!r} names no config class")
        return build(cls, {key: item for key, item in value.items() if key != "_target_"})

    return BeforeValidator(load)


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
class LauncherConfig:
    name: Literal["inline", "ray", "env"]
    """inline: this process; ray: `num_workers` Ray workers; env: torchrun, Slurm or MPI."""
    num_workers: PositiveInt
    """Ranks to start (ray), 1 for inline; for env WORLD_SIZE decides."""
    max_restarts: NonNegativeInt
    """How often failed workers are started again (ray)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AcceleratorConfig:
    name: str
    """File in cluster/accelerators that drives the device."""
    peak_flops: dict[str, PositiveFloat]
    """Vendor's dense peak in FLOP/s by dtype; empty where only a measurement means anything."""
    source: str
    """Where the figures come from."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoEConfig:
    num_experts: PositiveInt
    """Routed experts."""
    top_k: PositiveInt
    """Routed experts that compute each token."""
    num_shared_experts: NonNegativeInt
    """Experts that compute every token."""
    score: Literal["softmax", "sigmoid"]
    """What the router makes of its logits."""
    normalize: bool
    """Divide the scores of a token's experts by their sum."""
    balance_loss: NonNegativeFloat
    """Weight of the auxiliary loss num_experts * sum of load * mean score; 0: none."""
    z_loss: NonNegativeFloat
    """Weight of the mean of logsumexp(logits)^2; 0: none."""
    bias_rate: NonNegativeFloat
    """By how much a bias on the choice of an expert moves per step against its load; 0: none."""
    capacity: PositiveFloat | None
    """Length alignment in training: of each rank every expert computes this many times the mean of
    tokens, missing ones are padding and surplus ones are dropped, so that numbers depend on how
    tokens are spread over ranks; null: as many as come, none is dropped."""
    spiking_router: bool
    """Whether spike.enabled holds for the router's input as well."""

    def __post_init__(self) -> None:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} exceeds num_experts; use top_k={self.num_experts} or less"
            )
        if self.top_k == 1 and self.normalize:
            raise ValueError(
                "normalize=true with top_k=1 leaves the router no gradient; use normalize=false"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FFNConfig:
    intermediate_size: PositiveInt
    """Width of the SwiGLU, or of each expert."""
    moe: MoEConfig | None = None
    """Several experts in place of one SwiGLU."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LayerConfig:
    mixers: Annotated[list[str], Field(min_length=1)]
    """Names of the mixers; several run in parallel and their normalised outputs are summed."""
    ffn: str
    """Name of the FFN."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    layers: Annotated[list[LayerConfig], Field(min_length=1)]
    """The layer list; repeated in order until `num_layers` layers stand."""
    mixers: dict[str, Annotated[Any, extension("models.mixers")]]
    """Mixers by name, each `_target_` a config class of models/mixers."""
    ffns: dict[str, FFNConfig]
    num_sinks: NonNegativeInt = 0
    """Learned tokens before every document, which all its tokens see; they see each other."""
    norm_eps: PositiveFloat
    tie_embeddings: bool
    init_std: PositiveFloat
    """Standard deviation of the normal initialisation; output projections are scaled down by
    sqrt(2 num_layers)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    source: Literal["stdlib", "text"]
    path: str | list[str] | None
    """Files, folders or globs, local or fsspec URLs (text)."""
    format: Literal["txt", "jsonl", "parquet"] | None
    """null: by file ending."""
    text_key: str
    """Field that holds the text of a jsonl or parquet record."""
    tokenizer: str
    """bytes, or the path of a Hugging Face tokenizer (folder or tokenizer.json)."""
    cache_dir: str
    """Where tokenised shards are kept, keyed by a hash of input and tokenizer."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of the documents kept for validation."""
    seq_len: PositiveInt
    """Tokens of one sequence."""
    global_batch_size: PositiveInt
    """Sequences of one optimizer step."""
    micro_batch_size: PositiveInt
    """Sequences one rank computes at a time."""


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
class ParallelConfig:
    dp: PositiveInt | None
    """Data-parallel ranks; null: what the other axes leave of the world."""
    pp: PositiveInt
    """Stages of the pipeline, each a part of the layer list."""
    ep: PositiveInt
    """Neighbouring ranks of a stage that share out the routed experts."""
    ulysses: PositiveInt
    """Neighbouring ranks that exchange heads for tokens in full attention."""
    ring: PositiveInt
    """Places of the ring that keys go round in full attention; ulysses * ring ranks share a
    sequence."""
    layout: Literal["contiguous", "zigzag"]
    """Who holds which tokens: rank r the r-th part, or a pair of parts with even causal work."""
    linear: Literal["gather", "scan"]
    """States of linear layers: gathered by all ranks at once, or handed on from rank to rank."""
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    """DeepSpeed ZeRO: 0 none, 1 optimizer, 2 + gradients, 3 + parameters."""
    offload: Literal["none", "optimizer", "all"]
    """Keep optimizer state (ZeRO 1-3) or parameters too (ZeRO 3) in host memory."""
    recompute: Literal["none", "selective", "full"]
    """Activations recomputed in the backward pass: none; the FFNs (selective); whole layers."""
    moe_recompute: Literal["none", "activation", "experts", "layer"] = "none"
    """The same inside MoE layers: the activation and the router; the experts too, routed and
    shared; the whole MoE layer, dispatch and combine included."""
    recompute_above: PositiveInt | None = None
    """A routed expert that receives more tokens than this in a micro batch is recomputed, where
    nothing else has it so; null: none."""
    hot_experts: NonNegativeInt = 0
    """Most experts per layer of which a rank keeps a copy, where that saves bytes; 0: none."""
    timeout_seconds: PositiveFloat
    """Longest wait in one collective, and for all ranks to come."""
    sync: Literal["none", "device", "barrier"] = "none"
    """After the communication of a sequence-parallel layer: nothing; wait until the device is
    through; that, and until all ranks of the axis are."""


Implementation = Literal["auto", "reference", "torch", "cpp", "triton"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OpsConfig:
    """Implementation of each operator; auto: the registry chooses by device and dtype."""

    attention: Implementation = "auto"
    linear_attention: Implementation = "auto"
    delta_rule: Implementation = "auto"
    cross_entropy: Implementation = "auto"
    spike: Implementation = "auto"
    moe: Implementation = "auto"
    rms_norm: Implementation = "auto"
    rotary: Implementation = "auto"
    swiglu: Implementation = "auto"
    short_conv: Implementation = "auto"


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
class SpikeConfig:
    enabled: bool
    k: PositiveFloat
    """Threshold is mean(|x|) / k over a token's channels (eq. 19 of arXiv:2509.05276)."""


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    run: str
    """Run directory, or one of its checkpoints."""
    max_sequences: PositiveInt | None
    """Validation sequences; null: all."""


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
