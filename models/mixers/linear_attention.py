"""Gated linear attention, as in SpikingBrain (eq. 10 and 11 of arXiv:2509.05276).

The 7B model has a low-rank gate (GLA, arXiv:2312.06635), the 76B model one tied to the key: 1 - k.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import nn

from conf.schema import STRICT, OpsConfig, PositiveFloat, PositiveInt, SpikeConfig
from models.cache import LinearState, MixerCache
from models.layers import Projection, RMSNorm
from models.mixers import Mixer
from models.spiking import Activation, SpikeEncoder
from ops.linear_attention import linear_attention_step
from ops.linear_attention.torch_impl import CHUNK_SIZE
from parallel.cost import SequenceCost, Traffic
from parallel.sequence import SequenceContext, linear_attention


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LinearAttentionConfig:
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    """State heads: key, value and gate are shared by num_heads / num_kv_heads query heads."""
    head_dim: PositiveInt
    gate: Literal["low_rank", "key"] = "low_rank"
    """What a channel of the state keeps per token; key: 1 - k, without parameters of its own."""
    gate_rank: PositiveInt | None
    """Inner width of the low-rank gate: log_decay = logsigmoid(x W1 W2 + b) / gate_normalizer."""
    gate_normalizer: PositiveFloat | None
    feature_map: Literal["relu", "sigmoid", "none"]
    """Applied to q and k."""
    qkv_bias: bool

    def __post_init__(self) -> None:
        low_rank = (self.gate_rank, self.gate_normalizer)
        if self.gate == "low_rank" and None in low_rank:
            raise ValueError(
                f"gate=low_rank needs gate_rank and gate_normalizer, given {low_rank}; "
                "16 and 16.0 would do, as would gate=key without either"
            )
        if self.gate == "key" and low_rank != (None, None):
            raise ValueError(
                f"gate=key takes no gate_rank and gate_normalizer, given {low_rank}; "
                "set both to null, or gate=low_rank"
            )
        if self.gate == "key" and self.feature_map != "sigmoid":
            raise ValueError(
                f"gate=key keeps 1 - k and needs 0 < k < 1, not feature_map={self.feature_map}; "
                "feature_map=sigmoid would do, as would gate=low_rank"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; "
                f"num_kv_heads=1 and {self.num_heads} do"
            )

    def build(
        self, hidden_size: int, norm_eps: float, spike: SpikeConfig, ops: OpsConfig
    ) -> "LinearAttention":
        return LinearAttention(self, hidden_size, norm_eps, spike, ops)


class LinearAttention(Mixer):
    """S_t = diag(g_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t, one state per key/value head."""

    kind = "linear_attention"

    def __init__(
        self,
        config: LinearAttentionConfig,
        hidden_size: int,
        norm_eps: float,
        spike: SpikeConfig,
        ops: OpsConfig,
    ) -> None:
        super().__init__()
        self.config = config
        q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.encode_in = SpikeEncoder(spike, ops.spike)
        self.encode_out = SpikeEncoder(spike, ops.spike)
        self.q_proj = Projection(hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Projection(hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Projection(hidden_size, kv_size, bias=config.qkv_bias)
        self.gk_proj = nn.ModuleList()
        if config.gate_rank is not None:
            self.encode_gate = SpikeEncoder(spike, ops.spike)
            self.gk_proj.append(Projection(hidden_size, config.gate_rank))
            self.gk_proj.append(Projection(config.gate_rank, kv_size, bias=True))
        self.g_norm = RMSNorm(config.head_dim, norm_eps, ops.rms_norm)
        self.o_proj = Projection(q_size, hidden_size)

    def _project(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q [B, T, H, D]; k, v and float32 log_decay [B, T, H_kv, D]."""
        encoded = self.encode_in(x)
        split = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (p(encoded).view(split) for p in (self.q_proj, self.k_proj, self.v_proj))
        log_decay = self._log_decay(encoded, k)
        if self.config.feature_map == "relu":
            q, k = q.relu(), k.relu()
        elif self.config.feature_map == "sigmoid":
            # In bfloat16 the derivative k (1 - k) would be 0 wherever k rounds to 1, above 6.
            q, k = (x.float().sigmoid().to(x.dtype) for x in (q, k))
        return q, k, v, log_decay

    def _log_decay(self, encoded: Activation, k: torch.Tensor) -> torch.Tensor:
        """Return it in the shape of k, which has not been through its feature map."""
        if self.config.gate_normalizer is None:
            # This is log(1 - sigmoid(k)), whose difference would round to 0 for large k.
            return F.logsigmoid(-k.float())
        gate = self.gk_proj[1](self.encode_gate(self.gk_proj[0](encoded))).view(k.shape)
        return F.logsigmoid(gate.float()) / self.config.gate_normalizer

    def _output(self, out: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.encode_out(self.g_norm(out).flatten(2)))

    def forward(
        self, x: torch.Tensor, context: SequenceContext, cache: MixerCache | None = None
    ) -> torch.Tensor:
        q, k, v, log_decay = self._project(x)
        out, state = linear_attention(
            q, k, v, log_decay, context, output_final_state=cache is not None
        )
        if isinstance(cache, LinearState):
            cache.state = state
        return self._output(out)

    def decode(self, x: torch.Tensor, cache: MixerCache, position: int) -> torch.Tensor:
        assert isinstance(cache, LinearState), "linear attention decodes with its own cache"
        q, k, v, log_decay = (t.squeeze(1) for t in self._project(x))
        if cache.state is None:
            cache.state = k.new_zeros(*k.shape, v.shape[-1], dtype=torch.float32)
        out = linear_attention_step(q, k, v, log_decay, cache.state)
        return self._output(out.unsqueeze(1))

    def new_cache(self) -> LinearState:
        return LinearState()

    def reset(self, std: float, out_std: float) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj, *self.gk_proj):
            assert isinstance(projection, Projection)
            projection.reset(std)
        self.o_proj.reset(out_std)

    def mixing_flops(self, doc_lengths: Sequence[int], num_sinks: int = 0) -> float:
        heads = self.config.num_kv_heads + self.config.num_heads
        return 2.0 * self.config.head_dim**2 * heads * sum(doc_lengths)

    def extra_flops(self, doc_lengths: Sequence[int], num_sinks: int = 0) -> tuple[float, float]:
        # Products of C x C inside a chunk: scores and output; their gradients and scores again.
        inside = 2.0 * CHUNK_SIZE * self.config.head_dim * self.config.num_heads * sum(doc_lengths)
        return 2 * inside, 5 * inside

    def traffic(self, cost: SequenceCost) -> Traffic:
        head_dim = self.config.head_dim
        return cost.recurrent(self.config.num_kv_heads, head_dim, head_dim, "vector")
