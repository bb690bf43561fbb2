"""Gated linear attention, as in SpikingBrain (eq. 10 and 11 of arXiv:2509.05276).

The 7B model has a low-rank gate (GLA, arXiv:2312.06635), the 76B model one tied to the key: 1 - k.
Conversions of a Transformer may keep its rotary embedding and learn their feature maps (LoLCATs,
arXiv:2410.10254), divide by the sum of the weights as softmax does, and gate the output.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from conf.schema import STRICT, OpsConfig, PositiveFloat, PositiveInt, RopeScaling, SpikeConfig
from models.cache import LinearState, MixerCache
from models.feature_maps import FeatureKind, Hedgehog, feature_dim, fixed_features
from models.layers import Projection, RMSNorm
from models.mixers import Mixer, check_heads
from models.spiking import Activation, SpikeEncoder
from ops.linear_attention import linear_attention_step
from ops.linear_attention.torch_impl import CHUNK_SIZE
from ops.rotary import rotary, rotary_table
from parallel.cost import SequenceCost, Traffic
from parallel.sequence import SequenceContext, linear_attention

SMALLEST_SUM = 1e-12
"""Weights that sum to less, as where no feature of a query meets one of a key, divide by this."""
UNIT_GATE_BIAS = {"swish": 1.2784645, "sigmoid": 3.0}
"""Gates of the output begin at silu(1.278) = 1, sigmoid(3) = 0.95."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LinearAttentionConfig:
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    """State heads: key, value and gate are shared by num_heads / num_kv_heads query heads."""
    head_dim: PositiveInt
    gate: Literal["low_rank", "key", "head", "none"] = "low_rank"
    """What the state keeps per token, by channel, or by head (head: one number, as in Mamba-2);
    key: 1 - k, without parameters of its own; none: all."""
    gate_rank: PositiveInt | None = None
    """Inner width of the low-rank gate: log_decay = logsigmoid(x W1 W2 + b) / gate_normalizer;
    gate=head has one W for W1 W2 and no rank."""
    gate_normalizer: PositiveFloat | None = None
    half_life: Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)] | None = None
    """Tokens after which half of the state is left, at initialisation: spread geometrically from
    the first to the second, over the channels of a head, or over the heads with gate=head; null:
    b = 0, where gate_normalizer=16.0 gives 16 tokens."""
    feature_map: FeatureKind
    """Applied to q and k; elu: elu(x) + 1; hedgehog: learned, with twice the channels."""
    qkv_bias: bool
    qk_norm: bool = False
    """Normalise each head of q and k before the rotary embedding, as Qwen3 does."""
    rope_theta: PositiveFloat | None = None
    """Base of the rotary embedding of q and k before the feature map; null: none."""
    rope_scaling: RopeScaling | None = None
    normalize: Literal["rms", "sum", "none"] = "rms"
    """The output is divided by the root mean square of its head and scaled by channel (rms), or by
    the sum of the weights that its values have (sum), as softmax attention's is."""
    output_gate: Literal["none", "sigmoid", "swish"] = "none"
    """The normalised output is multiplied by this function of x W + b (W1 W2 if it has a rank)."""
    output_gate_rank: PositiveInt | None = None
    """Inner width of the output gate; null: W is as wide as q and as high as x."""

    def __post_init__(self) -> None:
        self._check_gate()
        check_heads(
            self.num_heads, self.num_kv_heads, self.head_dim, self.rope_theta, self.rope_scaling
        )
        if self.normalize == "sum" and self.feature_map == "none":
            raise ValueError(
                "normalize=sum divides by a sum that feature_map=none lets be 0; feature_map=relu "
                "would do, as would normalize=rms"
            )
        if self.output_gate == "none" and self.output_gate_rank is not None:
            raise ValueError(
                f"output_gate=none takes no output_gate_rank={self.output_gate_rank}; set it to "
                "null, or output_gate=swish"
            )

    def _check_gate(self) -> None:
        given = (self.gate_rank, self.gate_normalizer)
        if self.gate == "low_rank" and None in given:
            raise ValueError(
                f"gate=low_rank needs gate_rank and gate_normalizer, given {given}; "
                "16 and 16.0 would do, as would gate=key without either"
            )
        if self.gate == "head" and (given[0] is not None or given[1] is None):
            raise ValueError(
                f"gate=head needs gate_normalizer and no gate_rank, given {given[::-1]}; "
                "16.0 and null would do"
            )
        if self.gate in ("key", "none") and given != (None, None):
            raise ValueError(
                f"gate={self.gate} takes no gate_rank and gate_normalizer, given {given}; "
                "set both to null, or gate=low_rank"
            )
        if self.gate in ("key", "none") and self.half_life is not None:
            raise ValueError(
                f"gate={self.gate} has no bias that half_life={self.half_life} could set; "
                "half_life=null would do, as would gate=low_rank"
            )
        if self.gate == "key" and self.feature_map != "sigmoid":
            raise ValueError(
                f"gate=key keeps 1 - k and needs 0 < k < 1, not feature_map={self.feature_map}; "
                "feature_map=sigmoid would do, as would gate=low_rank"
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
        self.rotary_impl = ops.rotary
        head_dim = config.head_dim
        q_size, kv_size = (n * head_dim for n in (config.num_heads, config.num_kv_heads))
        self.num_features = feature_dim(config.feature_map, head_dim)
        self.encode_in = SpikeEncoder(spike, ops.spike)
        self.encode_out = SpikeEncoder(spike, ops.spike)
        self.q_proj = Projection(hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Projection(hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Projection(hidden_size, kv_size, bias=config.qkv_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, norm_eps, ops.rms_norm)
            self.k_norm = RMSNorm(head_dim, norm_eps, ops.rms_norm)
        if config.feature_map == "hedgehog":
            self.q_features = Hedgehog(config.num_heads, head_dim, SpikeEncoder(spike, ops.spike))
            self.k_features = Hedgehog(
                config.num_kv_heads, head_dim, SpikeEncoder(spike, ops.spike)
            )
        self.gk_proj, self.g_proj = nn.ModuleList(), nn.ModuleList()
        if config.gate == "low_rank":
            self.encode_gate = SpikeEncoder(spike, ops.spike)
            gates = config.num_kv_heads * self.num_features
            self.gk_proj = _in_factors(hidden_size, config.gate_rank, gates)
        elif config.gate == "head":
            self.gk_proj = _in_factors(hidden_size, None, config.num_kv_heads)
        if config.normalize == "rms":
            self.g_norm = RMSNorm(head_dim, norm_eps, ops.rms_norm)
        if config.output_gate != "none":
            self.g_proj = _in_factors(hidden_size, config.output_gate_rank, q_size)
        if config.output_gate_rank is not None:
            self.encode_output_gate = SpikeEncoder(spike, ops.spike)
        self.o_proj = Projection(q_size, hidden_size)
        self.has_int8_state = False
        """Whether decoding keeps the state in INT8."""

    def _project(
        self, encoded: Activation, table: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return q [B, T, H, D_k], k, v [B, T, H_kv, D_v] and the float32 log_decay of the state,
        None or [B, T, H_kv] or [B, T, H_kv, D_k].
        """
        q, k, v = (
            p(encoded).unflatten(-1, (-1, self.config.head_dim))
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = (rotary(x, *table, impl=self.rotary_impl) for x in (q, k))
        log_decay = self._log_decay(encoded, k)
        if self.config.feature_map == "hedgehog":
            q, k = self.q_features(q), self.k_features(k)
        else:
            q, k = (fixed_features(self.config.feature_map, x) for x in (q, k))
        if self.config.normalize == "sum":
            # A further value of 1 adds up to the sum of the weights, and decays as they do.
            v = F.pad(v, (0, 1), value=1.0)
        return q, k, v, log_decay

    def _log_decay(self, encoded: Activation, k: torch.Tensor) -> torch.Tensor | None:
        """Return what the state loses, for keys k that have not been through their feature map."""
        if self.config.gate == "none":
            return None
        if self.config.gate == "key":
            # This is log(1 - sigmoid(k)), whose difference would round to 0 for large k.
            return F.logsigmoid(-k.float())
        assert self.config.gate_normalizer is not None, "checked by the config"
        gate = self.gk_proj[0](encoded)
        if self.config.gate == "low_rank":
            gate = self.gk_proj[1](self.encode_gate(gate)).unflatten(-1, (-1, self.num_features))
        return F.logsigmoid(gate.float()) / self.config.gate_normalizer

    def _output(self, out: torch.Tensor, encoded: Activation) -> torch.Tensor:
        if self.config.normalize == "rms":
            out = self.g_norm(out)
        elif self.config.normalize == "sum":
            out = out[..., :-1] / out[..., -1:].clamp(min=SMALLEST_SUM)
        out = out.flatten(2)
        if self.config.output_gate != "none":
            gate = self.g_proj[0](encoded)
            if self.config.output_gate_rank is not None:
                gate = self.g_proj[1](self.encode_output_gate(gate))
            out = out * (F.silu(gate) if self.config.output_gate == "swish" else gate.sigmoid())
        return self.o_proj(self.encode_out(out))

    def forward(
        self, x: torch.Tensor, context: SequenceContext, cache: MixerCache | None = None
    ) -> torch.Tensor:
        c, table = self.config, None
        if c.rope_theta is not None:
            table = context.rotary_table(c.head_dim, c.rope_theta, c.rope_scaling)
        encoded = self.encode_in(x)
        out, state = linear_attention(
            *self._project(encoded, table), context, output_final_state=cache is not None
        )
        if isinstance(cache, LinearState):
            cache.state = state
        return self._output(out, encoded)

    def decode(self, x: torch.Tensor, cache: MixerCache, position: int) -> torch.Tensor:
        assert isinstance(cache, LinearState), "linear attention decodes with its own cache"
        c, table = self.config, None
        if c.rope_theta is not None:
            positions = torch.tensor([position], device=x.device)
            table = rotary_table(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        encoded = self.encode_in(x)
        q, k, v, log_decay = (
            None if t is None else t.squeeze(1) for t in self._project(encoded, table)
        )
        assert q is not None
        assert k is not None
        assert v is not None
        state = cache.state
        if state is None:
            state = k.new_zeros(*k.shape, v.shape[-1], dtype=torch.float32)
        out = linear_attention_step(q, k, v, log_decay, state)
        cache.state = state
        return self._output(out.unsqueeze(1), encoded)

    def new_cache(self) -> LinearState:
        return LinearState(is_int8=self.has_int8_state)

    def reset(self, std: float, out_std: float) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            projection.reset(std)
        self.reset_additions(std, std)
        self.o_proj.reset(out_std)

    def reset_additions(self, std: float, last_std: float) -> None:
        for gate in (self.gk_proj, self.g_proj):
            for projection in gate:
                assert isinstance(projection, Projection)
                projection.reset(last_std if projection is gate[-1] else std)
        if self.config.half_life is not None:
            self._reset_half_life(*self.config.half_life)
        if self.config.output_gate != "none":
            bias = self.g_proj[-1].bias
            assert isinstance(bias, torch.Tensor)
            nn.init.constant_(bias, UNIT_GATE_BIAS[self.config.output_gate])
        if self.config.feature_map == "hedgehog":
            self.q_features.reset()
            self.k_features.reset()

    def _reset_half_life(self, first: float, last: float) -> None:
        """Set the bias b to where logsigmoid(b) / gate_normalizer halves in so many tokens."""
        bias, normalizer = self.gk_proj[-1].bias, self.config.gate_normalizer
        assert isinstance(bias, torch.Tensor)
        assert normalizer is not None
        count = self.config.num_kv_heads if self.config.gate == "head" else self.num_features
        tokens = torch.logspace(math.log2(first), math.log2(last), count, base=2.0)
        gate = -torch.expm1(normalizer * math.log(2) / tokens).log()
        with torch.no_grad():
            bias.copy_(gate.repeat(len(bias) // count))

    def mixing_flops(self, doc_lengths: Sequence[int], num_sinks: int = 0) -> float:
        heads = self.config.num_kv_heads + self.config.num_heads
        return 2.0 * self.num_features * self._num_values * heads * sum(doc_lengths)

    def extra_flops(self, doc_lengths: Sequence[int], num_sinks: int = 0) -> tuple[float, float]:
        # Products of C x C inside a chunk: scores and output; their gradients and scores again.
        inside = 2.0 * CHUNK_SIZE * self.config.num_heads * sum(doc_lengths)
        scores, output = inside * self.num_features, inside * self._num_values
        return scores + output, 3 * scores + 2 * output

    def traffic(self, cost: SequenceCost) -> Traffic:
        gate: Literal["none", "scalar", "vector"] = "vector"
        if self.config.gate in ("none", "head"):
            gate = "none" if self.config.gate == "none" else "scalar"
        return cost.recurrent(self.config.num_kv_heads, self.num_features, self._num_values, gate)

    @property
    def _num_values(self) -> int:
        return self.config.head_dim + (self.config.normalize == "sum")


def _in_factors(in_features: int, rank: int | None, out_features: int) -> nn.ModuleList:
    """Return one projection with a bias, or two of which the first leads to `rank` channels."""
    if rank is None:
        return nn.ModuleList([Projection(in_features, out_features, bias=True)])
    inner, outer = Projection(in_features, rank), Projection(rank, out_features, bias=True)
    return nn.ModuleList([inner, outer])
