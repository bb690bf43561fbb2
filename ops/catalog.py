"""All operators and the tables of their implementations, under the names that a config pins."""

import ops.attention
import ops.cross_entropy
import ops.delta_rule
import ops.int8_linear
import ops.linear_attention
import ops.moe
import ops.rms_norm
import ops.rotary
import ops.short_conv
import ops.spike
import ops.swiglu
from ops.registry import Implementation

OPERATORS: dict[str, tuple[Implementation, ...]] = {
    "attention": ops.attention.IMPLEMENTATIONS,
    "linear_attention": ops.linear_attention.IMPLEMENTATIONS,
    "delta_rule": ops.delta_rule.IMPLEMENTATIONS,
    "cross_entropy": ops.cross_entropy.IMPLEMENTATIONS,
    "spike": ops.spike.IMPLEMENTATIONS,
    "rms_norm": ops.rms_norm.IMPLEMENTATIONS,
    "rotary": ops.rotary.IMPLEMENTATIONS,
    "swiglu": ops.swiglu.IMPLEMENTATIONS,
    "short_conv": ops.short_conv.IMPLEMENTATIONS,
    "moe": ops.moe.IMPLEMENTATIONS,
    "int8_linear": ops.int8_linear.IMPLEMENTATIONS,
}
