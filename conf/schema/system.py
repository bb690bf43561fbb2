"""Where and how a run computes: processes, devices, layouts, operators."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from conf.schema.base import STRICT, NonNegativeInt, PositiveFloat, PositiveInt


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
    int8_linear: Implementation = "auto"
