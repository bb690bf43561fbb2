"""All operators and the tables of their implementations, under the names that a config pins."""

import ops.attention
import ops.cross_entropy
import ops.linear_attention
import ops.rms_norm
import ops.rotary
import ops.spike
from ops.registry import Implementation

OPERATORS: dict[str, tuple[Implementation, ...]] = {
    "attention": ops.attention.IMPLEMENTATIONS,
    "linear_attention": ops.linear_attention.IMPLEMENTATIONS,
    "cross_entropy": ops.cross_entropy.IMPLEMENTATIONS,
    "spike": ops.spike.IMPLEMENTATIONS,
    "rms_norm": ops.rms_norm.IMPLEMENTATIONS,
    "rotary": ops.rotary.IMPLEMENTATIONS,
}
