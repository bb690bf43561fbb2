"""Mixture of experts: router, routed experts side by side, shared experts (eq. 15-18 of
arXiv:2509.05276).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from conf.schema import FFNConfig, MoEConfig, OpsConfig, SpikeConfig
from models.layers import FFN, SwiGLU, project_product
from models.spiking import SpikeEncoder, Spikes
from ops.moe import grouped_matmul, route
from ops.swiglu import swiglu
from parallel.comm import Comm
from parallel.expert import Dispatch, mark_expert
from parallel.expert_alignment import AlignedDispatch
from parallel.hot_experts import HotExperts
from parallel.pipeline import ModelPart
from parallel.recompute import Recompute, is_backward, run_recomputed
from parallel.sequence import SequenceContext


@dataclass
class Routing:
    """What a router saw since it was last asked, summed over this rank's tokens without sinks.

    Attributes:
        load: float64 [num_experts], tokens that chose each expert.
        score: float64 [num_experts], scores, each token's with sum 1.
        entropy: float64 [], of these in nats.
        z: float64 [], of logsumexp(logits)^2.
        tokens: float64 [], how many there were.
        dropped: float64 [], choices that found their expert full.
        recomputed: float64 [], rows that experts will compute again because they were many; those
            of sinks are among them.
    """

    load: torch.Tensor
    score: torch.Tensor
    entropy: torch.Tensor
    z: torch.Tensor
    tokens: torch.Tensor
    dropped: torch.Tensor
    recomputed: torch.Tensor

    def flatten(self) -> torch.Tensor:
        """Return all in one vector."""
        return torch.cat([getattr(self, name).flatten() for name in self.__dataclass_fields__])

    @classmethod
    def unflatten(cls, flat: torch.Tensor) -> "Routing":
        """Return what `flatten` made."""
        num_experts = (len(flat) - 5) // 2
        return cls(flat[:num_experts], flat[num_experts : 2 * num_experts], *flat[-5:])

    @classmethod
    def empty(cls, num_experts: int, device: torch.device | None = None) -> "Routing":
        return cls.unflatten(torch.zeros(2 * num_experts + 5, dtype=torch.float64, device=device))


class Router(nn.Module):
    """Chooses the experts of a token, in float32; keeps the load of the last step.

    `load` is each expert's share of the choices of all tokens of the last optimizer step, over all
    ranks. The auxiliary loss holds this step's scores against it, so that no collective stands in
    the forward pass and the loss is the same however tokens are spread over ranks and micro
    batches. `bias` is added to the scores for the choice alone (arXiv:2408.15664).
    """

    load: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self, config: MoEConfig, hidden_size: int, spike: SpikeConfig, ops: OpsConfig
    ) -> None:
        super().__init__()
        self.config, self.impl = config, ops.moe
        size = config.num_experts
        self.encode_in = SpikeEncoder(spike, ops.spike) if config.spiking_router else None
        self.weight = nn.Parameter(torch.empty(size, hidden_size))
        self.register_buffer("load", torch.full((size,), 1 / size))
        self.register_buffer("bias", torch.zeros(size))
        self.routing: Routing | None = None

    def forward(
        self, x: torch.Tensor, *, num_sinks: int = 0, loss_scale: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights, float32 [N, k], and experts, int64 [N, k].

        Args:
            x: tokens [N, E].
            num_sinks: first rows that are no tokens of data; statistics and losses leave them out.
            loss_scale: weight of the auxiliary losses of one token in what is differentiated.
        """
        config = self.config
        logits = self._logits(x)
        weights, experts = route(
            logits,
            config.top_k,
            normalize=config.normalize,
            score=config.score,
            bias=self.bias if config.bias_rate else None,
            impl=self.impl,
        )
        if not self.training:
            return weights, experts
        tokens = logits[num_sinks:]
        scores = tokens.softmax(-1)
        if config.score == "sigmoid":
            scores = tokens.sigmoid()
            scores = scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo().tiny)
        z = tokens.logsumexp(-1).square()
        if not is_backward():
            self._observe(scores.detach(), z.detach(), experts[num_sinks:])
        balance = config.balance_loss * config.num_experts * (scores * self.load).sum()
        return _AddLoss.apply(weights, (balance + config.z_loss * z.sum()) * loss_scale), experts

    def take_routing(self) -> Routing:
        """Return what was seen since the last call and start afresh."""
        routing = self.routing or Routing.empty(self.config.num_experts, self.load.device)
        self.routing = None
        return routing

    def note(self, dropped: torch.Tensor | int, recomputed: torch.Tensor | int) -> None:
        """Take what became of the choices of a micro batch, for `routing`."""
        assert self.routing is not None, "a forward pass in training mode came before"
        self.routing.dropped += dropped
        self.routing.recomputed += recomputed

    def balance(self, load: torch.Tensor) -> None:
        """Take the tokens that chose each expert in a step, over all ranks."""
        load = load.to(self.load)
        self.load.copy_(load / load.sum().clamp_min(1))
        self.bias.add_((load.mean() - load).sign(), alpha=self.config.bias_rate)

    def reset(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        nn.init.constant_(self.load, 1 / len(self.load))
        nn.init.zeros_(self.bias)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        encoded = x if self.encode_in is None else self.encode_in(x)
        if isinstance(encoded, Spikes):
            return F.linear(encoded.count.float(), self.weight) * encoded.threshold
        return F.linear(encoded.float(), self.weight)

    def _observe(self, scores: torch.Tensor, z: torch.Tensor, experts: torch.Tensor) -> None:
        seen = self.routing or Routing.empty(self.config.num_experts, scores.device)
        seen.load += experts.flatten().bincount(minlength=self.config.num_experts)
        seen.score += scores.sum(0, dtype=torch.float64)
        seen.entropy += torch.special.entr(scores).sum(dtype=torch.float64)
        seen.z += z.sum(dtype=torch.float64)
        seen.tokens += len(scores)
        self.routing = seen


class Experts(nn.Module):
    """SwiGLUs side by side, of which each row goes through one."""

    def __init__(
        self,
        num_experts: int,
        config: FFNConfig,
        size: int,
        spike: SpikeConfig,
        ops: OpsConfig,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        inner, self.ops, self.recompute = config.intermediate_size, ops, recompute
        self.encode_in = SpikeEncoder(spike, ops.spike)
        self.encode_out = SpikeEncoder(spike, ops.spike)
        self.gate_proj = nn.Parameter(torch.empty(num_experts, inner, size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, inner, size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, size, inner))
        for parameter in self.parameters():
            mark_expert(parameter)

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        """Those of gate, up and down, of all experts here."""
        return self.gate_proj, self.up_proj, self.down_proj

    def forward(
        self,
        rows: torch.Tensor,
        counts: torch.Tensor,
        weights: tuple[torch.Tensor, ...] | None = None,
    ) -> torch.Tensor:
        """Return [M, E] of rows [M, E] sorted by expert, `counts` [num_experts] of each.

        Args:
            weights: in place of its own, of as many experts as there are counts.
        """
        weights = weights or self.weights
        above = self.recompute.above if self.training else None
        sizes = [] if above is None else counts.tolist()
        if above is None or max(sizes) <= above:
            return self._compute(rows, counts, weights)
        # Neighbors together, so that one node puts the gradients of all their weights together.
        runs = [(many, list(run)) for many, run in itertools.groupby(sizes, lambda n: n > above)]
        lengths = [len(run) for _, run in runs]
        parts = zip(
            (many for many, _ in runs),
            rows.split([sum(run) for _, run in runs]),
            counts.split(lengths),
            zip(*(weight.split(lengths) for weight in weights), strict=True),
            strict=True,
        )
        return torch.cat(
            [run_recomputed(self._compute, *part, many, when=many) for many, *part in parts]
        )

    def count_recomputed(self, counts: torch.Tensor) -> torch.Tensor | int:
        """Return how many rows run again because their expert has many."""
        above = self.recompute.above
        return 0 if above is None else (counts * (counts > above)).sum()

    def _compute(
        self,
        rows: torch.Tensor,
        counts: torch.Tensor,
        weights: tuple[torch.Tensor, ...],
        runs_again: bool = False,
    ) -> torch.Tensor:
        gate_proj, up_proj, down_proj = weights
        encoded = self.encode_in(rows)
        gate = self._multiply(encoded, gate_proj, counts)
        up = self._multiply(encoded, up_proj, counts)
        return project_product(
            lambda: self.encode_out(swiglu(gate, up, impl=self.ops.swiglu)),
            lambda inner: self._multiply(inner, down_proj, counts),
            recompute=self.recompute.moe == "activation" and not runs_again,
        )

    def _multiply(
        self, x: torch.Tensor | Spikes, weight: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        if isinstance(x, Spikes):
            out = self._multiply(x.count, weight, counts)
            return out * x.threshold.to(out.dtype)
        return grouped_matmul(x, weight.to(x.dtype), counts, impl=self.ops.moe)


class MoE(FFN):
    """Routed experts, of which each token has its own, and shared ones."""

    kind = "moe"

    def __init__(
        self,
        config: FFNConfig,
        hidden_size: int,
        spike: SpikeConfig,
        ops: OpsConfig,
        part: ModelPart,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        assert config.moe is not None, "a dense FFN is a SwiGLU"
        self.config, self.impl, self.recompute = config.moe, ops.moe, recompute
        self.first_expert = config.moe.num_experts // part.ep_size * part.ep_rank
        local = config.moe.num_experts // part.ep_size
        self.router = Router(config.moe, hidden_size, spike, ops)
        self.experts = Experts(local, config, hidden_size, spike, ops, recompute)
        shared = config.moe.num_shared_experts
        wide = FFNConfig(intermediate_size=max(1, shared) * config.intermediate_size)
        self.shared = SwiGLU(wide, hidden_size, spike, ops) if shared else None
        if self.shared is not None:
            self.shared.recomputes_product = recompute.moe == "activation"

    def forward(self, x: torch.Tensor, context: SequenceContext | None = None) -> torch.Tensor:
        comm = Comm() if context is None else context.comm.at(kind=self.kind)
        num_sinks = 0 if context is None else context.num_sinks
        loss_scale = 0.0 if context is None else context.aux_loss_scale
        level = self.recompute.moe
        hot = HotExperts() if context is None else context.hot_experts
        rows = x.flatten(0, -2)
        lent = hot.lend(comm.layer)
        weights, experts = run_recomputed(
            lambda h: self.router(h, num_sinks=num_sinks, loss_scale=loss_scale),
            rows,
            when=level != "none",
        )
        dispatch = self._dispatch(rows, experts, comm, context, lent.copied)
        hot.count(comm.layer, experts.flatten().bincount(minlength=self.config.num_experts))
        if self.training and not is_backward():
            counts = torch.cat([dispatch.counts, dispatch.kept_counts])
            recomputed = self.experts.count_recomputed(counts)
            self.router.note(dispatch.count_dropped(num_sinks), recomputed)
        again = level == "experts"
        # While the rows travel.
        shared = None if self.shared is None else run_recomputed(self.shared, rows, when=again)
        kept = None
        if lent.copied:
            inputs = dispatch.kept, dispatch.kept_counts, lent.copies()
            kept = run_recomputed(self.experts, *inputs, when=again)
        out = run_recomputed(self.experts, dispatch.wait(), dispatch.counts, lent.own, when=again)
        out = dispatch.combine(out, weights, kept)
        return (out if shared is None else out + shared).view_as(x)

    def _dispatch(
        self,
        rows: torch.Tensor,
        experts: torch.Tensor,
        comm: Comm,
        context: SequenceContext | None,
        copied: Sequence[int],
    ) -> Dispatch:
        config = self.config
        if config.capacity is None or not self.training:
            # Who evaluates or decodes wants every token computed, and as if it were alone.
            return Dispatch(rows, experts, config.num_experts, comm, copied=copied, impl=self.impl)
        # Ranks that share a sequence can differ by a token, experts must not.
        tokens = len(rows)
        if context is not None:
            layout = context.layout
            tokens = context.num_sinks + max(layout.count(r) for r in range(layout.sp_size))
        capacity = math.ceil(config.capacity * tokens * config.top_k / config.num_experts)
        return AlignedDispatch(
            rows, experts, config.num_experts, comm, capacity=capacity, impl=self.impl
        )

    def reset(self, std: float, out_std: float) -> None:
        self.router.reset(std)
        if self.shared is not None:
            self.shared.reset(std, out_std)
        seed = torch.initial_seed()
        for i in range(len(self.experts.gate_proj)):
            # Each expert's own, so that a rank which holds some draws no others.
            torch.manual_seed(seed + 1 + self.first_expert + i)
            nn.init.normal_(self.experts.gate_proj[i], std=std)
            nn.init.normal_(self.experts.up_proj[i], std=std)
            nn.init.normal_(self.experts.down_proj[i], std=out_std)

    def active_weights(self) -> int:
        routed = self.config.top_k * self.expert_weights()
        shared = 0 if self.shared is None else self.shared.active_weights()
        return routed + shared + self.router.weight.numel()

    def computed_weights(self) -> tuple[float, float]:
        config, router = self.config, self.router.weight.numel()
        padding = config.top_k * ((config.capacity or 1) - 1) * self.expert_weights()
        computed = self.active_weights() + padding
        again = {"none": 0, "activation": router, "experts": computed, "layer": 0}
        return computed, again[self.recompute.moe]

    def expert_weights(self) -> int:
        """Return the weights of one routed expert."""
        return sum(weight[0].numel() for weight in self.experts.weights)


class _AddLoss(torch.autograd.Function):
    """Return x; backward, `loss` gets a gradient of 1, as if it were part of the model's loss."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.dtype, ctx.device = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return dx, torch.ones((), dtype=ctx.dtype, device=ctx.device)
