"""The architecture: layers, mixers, FFNs, experts, spiking."""

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
class RopeScaling:
    """Lower frequencies of the rotary embedding, for sequences longer than those trained on."""

    kind: Literal["linear", "llama3", "yarn"]
    """linear: all channels alike (arXiv:2306.15595); llama3: those with few rotations over
    `original_seq_len`; yarn: the same with another ramp, and longer queries and keys
    (arXiv:2309.00071)."""
    factor: PositiveFloat
    """By how much frequencies are divided."""
    original_seq_len: PositiveInt | None = None
    """Tokens that the model was trained on before; all kinds but linear."""
    slow: PositiveFloat | None = None
    """Channels with fewer rotations over `original_seq_len` are slowed down by the whole factor."""
    fast: PositiveFloat | None = None
    """Channels with more rotations stay as they are; those between are slowed down in part."""
    attention_factor: PositiveFloat | None = None
    """What yarn multiplies queries and keys by; null: 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        ramp = (self.original_seq_len, self.slow, self.fast)
        if self.kind == "linear" and ramp != (None, None, None):
            raise ValueError(
                f"kind=linear takes no original_seq_len, slow and fast, given {ramp}; set them to "
                "null, or kind=llama3 or yarn"
            )
        if self.kind != "linear" and (None in ramp or not ramp[1] < ramp[2]):  # type: ignore[operator]
            raise ValueError(
                f"kind={self.kind} needs original_seq_len and slow < fast, given {ramp}; "
                "8192, 1.0 and 4.0 would do, as would kind=linear without them"
            )
        if self.kind != "yarn" and self.attention_factor is not None:
            raise ValueError(f"kind={self.kind} takes no attention_factor; set it to null")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SpikeConfig:
    enabled: bool
    k: PositiveFloat
    """Threshold is mean(|x|) / k over a token's channels (eq. 19 of arXiv:2509.05276)."""
    k_by_input: dict[str, PositiveFloat | None] | None = None
    """In place of `k`, for inputs whose name matches a pattern, as in layers.*.ffn.encode_out, the
    input of the down projections; null there: not spiked. Of several matches the last one holds."""
    rate_weight: NonNegativeFloat = 0.0
    """Weight in training of the mean over the channels of log2(1 + |x| / threshold), a smooth count
    of the bits of a spike count, summed over all inputs; 0: none."""
