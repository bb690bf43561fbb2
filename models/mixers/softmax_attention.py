"""Softmax attention with rotary embedding and grouped heads, full or within a window.

With `qk_norm` queries and keys have a norm of their own, as in Qwen3 (arXiv:2505.09388).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass

from conf.schema import STRICT, OpsConfig, PositiveFloat, PositiveInt, RopeScaling, SpikeConfig
from models.cache import KeyValueCache, KeyValueScales, MixerCache
from models.layers import Projection, RMSNorm
from models.mixers import Mixer, check_heads
from models.spiking import SpikeEncoder
from ops.rotary import rotary, rotary_table
from parallel.cost import SequenceCost, Traffic
from parallel.sequence import SequenceContext, attention


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SoftmaxAttentionConfig:
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    window_size: PositiveInt | None
    """A query sees this many keys, its own included; null: all before it."""
    rope_theta: PositiveFloat | None
    """Base of the rotary embedding; null: none."""
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool
    qk_norm: bool = False
    """Whether each head's query and key are normalised (RMSNorm) before the rotary embedding."""

    def __post_init__(self) -> None:
        check_heads(
            self.num_heads, self.num_kv_heads, self.head_dim, self.rope_theta, self.rope_scaling
        )

    def build(
        self, hidden_size: int, norm_eps: float, spike: SpikeConfig, ops: OpsConfig
    ) -> "SoftmaxAttention":
        return SoftmaxAttention(self, hidden_size, norm_eps, spike, ops)


class SoftmaxAttention(Mixer):
    """Eq. 1 (full) and 2 (window) of arXiv:2509.05276."""

    def __init__(
        self,
        config: SoftmaxAttentionConfig,
        hidden_size: int,
        norm_eps: float,
        spike: SpikeConfig,
        ops: OpsConfig,
    ) -> None:
        super().__init__()
        self.config = config
        self.rotary_impl = ops.rotary
        self.kind = "full_attention" if config.window_size is None else "window_attention"
        q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.encode_in = SpikeEncoder(spike, ops.spike)
        self.encode_out = SpikeEncoder(spike, ops.spike)
        self.q_proj = Projection(hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Projection(hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Projection(hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Projection(q_size, hidden_size)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, norm_eps, ops.rms_norm)
            self.k_norm = RMSNorm(config.head_dim, norm_eps, ops.rms_norm)
        self.kv_scales: KeyValueScales | None = None
        """Of INT8 keys and values; None: they stay as they come."""

    def _project(
        self, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q [B, T, H, D] and k, rotated by the table, and v [B, T, H_kv, D]."""
        encoded = self.encode_in(x)
        split = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (p(encoded).view(split) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = (rotary(x, *table, impl=self.rotary_impl) for x in (q, k))
        return (q, k, v) if self.kv_scales is None else self.kv_scales.encode(q, k, v)

    def _output(self, out: torch.Tensor) -> torch.Tensor:
        if self.kv_scales is not None:
            out = self.kv_scales.decode(out)
        return self.o_proj(self.encode_out(out.flatten(2)))

    def forward(
        self, x: torch.Tensor, context: SequenceContext, cache: MixerCache | None = None
    ) -> torch.Tensor:
        c = self.config
        table = None
        if c.rope_theta is not None:
            table = context.rotary_table(c.head_dim, c.rope_theta, c.rope_scaling)
        q, k, v = self._project(x, table)
        if isinstance(cache, KeyValueCache):
            cache.fill(k, v, context.num_sinks)
        out = attention(q, k, v, context, window_size=c.window_size)
        return self._output(out)

    def decode(self, x: torch.Tensor, cache: MixerCache, position: int) -> torch.Tensor:
        assert isinstance(cache, KeyValueCache), "softmax attention decodes with its own cache"
        c = self.config
        table = None
        if c.rope_theta is not None:
            positions = torch.tensor([position], device=x.device)
            table = rotary_table(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        q, k, v = self._project(x, table)
        keys, values = cache.append(k, v)
        # The queries of a group stand in the place of tokens, so that their keys are read once.
        grouped = q.view(len(x), c.num_kv_heads, -1, c.head_dim)
        out = F.scaled_dot_product_attention(grouped, keys.transpose(1, 2), values.transpose(1, 2))
        return self._output(out.reshape(q.shape))

    def new_cache(self) -> KeyValueCache:
        return KeyValueCache(self.config.window_size, is_int8=self.kv_scales is not None)

    def reset(self, std: float, out_std: float) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            projection.reset(std)
        self.o_proj.reset(out_std)

    def mixing_flops(self, doc_lengths: Sequence[int], num_sinks: int = 0) -> float:
        pairs = num_sinks * sum(doc_lengths)
        for length in doc_lengths:
            w = min(self.config.window_size or length, length)
            pairs += length * w - w * (w - 1) // 2
        return 4.0 * self.config.num_heads * self.config.head_dim * pairs

    def extra_flops(self, doc_lengths: Sequence[int], num_sinks: int = 0) -> tuple[float, float]:
        return 0.0, self.mixing_flops(doc_lengths, num_sinks) / 2  # the scores again

    def traffic(self, cost: SequenceCost) -> Traffic:
        c = self.config
        return cost.attention(c.num_heads, c.num_kv_heads, c.head_dim, c.window_size)
