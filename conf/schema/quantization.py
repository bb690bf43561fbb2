"""INT8 weights, keys, values and states of a model that no longer learns."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from conf.schema.base import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QuantizationConfig:
    group_size: Annotated[int, Field(ge=1, multiple_of=64)] | None = None
    """Input channels that share a scale of a weight's row; null: all of them."""
    clip: Literal["none", "mse"] = "none"
    """none: the largest weight becomes 127; mse: the scale that loses least of the outputs on the
    calibration samples."""
    activations: Literal["int8", "int16"] = "int16"
    """What multiplies the weights where spiking is off: integers of this width, scaled per token.
    Where it is on, spike counts do."""
    head: Literal["none", "int8"] = "none"
    """Weights of the vocabulary projection, whose input never spikes."""
    kv_cache: Literal["none", "int8"] = "int8"
    """Keys and values of softmax attention, scaled per channel as calibrated."""
    state: Literal["none", "int8"] = "none"
    """State of linear attention while decoding, scaled per row and rounded after every token."""
