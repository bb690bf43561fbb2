"""Gated linear attention with a low-rank gate (GLA, arXiv:2312.06635), as in SpikingBrain-7B."""

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
from models.spiking import SpikeEncoder
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
    gate_rank: PositiveInt
    """Inner width of the gate: log_decay = logsigmoid(x W1 W2 + b) / gate_normalizer."""
    gate_normalizer: PositiveFloat
    feature_map: Literal["relu", "none"]
    """Applied to q and k."""
    qkv_bias: bool

    def __post_init__(self) -> None:
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
    """Eq. 10 and 11 of arXiv:2509.05276, one state per key/value head."""

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
        self.encode_gate = SpikeEncoder(spike, ops.spike)
        self.encode_out = SpikeEncoder(spike, ops.spike)
        self.q_proj = Projection(hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Projection(hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Projection(hidden_size, kv_size, bias=config.qkv_bias)
        self.gk_proj = nn.ModuleList(
            [
                Projection(hidden_size, config.gate_rank),
                Projection(config.gate_rank, kv_size, bias=True),
            ]
        )
        self.g_norm = RMSNorm(config.head_dim, norm_eps, ops.rms_norm)
        self.o_proj = Projection(q_size, hidden_size)

    def _project(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q [B, T, H, D]; k, v and float32 log_decay [B, T, H_kv, D]."""
        encoded = self.encode_in(x)
        split = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (p(encoded).view(split) for p in (self.q_proj, self.k_proj, self.v_proj))
        gate = self.gk_proj[1](self.encode_gate(self.gk_proj[0](encoded))).view(split)
        log_decay = F.logsigmoid(gate.float()) / self.config.gate_normalizer
        if self.config.feature_map == "relu":
            q, k = q.relu(), k.relu()
        return q, k, v, log_decay

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
