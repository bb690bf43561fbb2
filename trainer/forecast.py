"""Predicts what a run sends, by walking the layer list with the formulas of `parallel.cost`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch

from conf.schema import MoEConfig, ParallelConfig
from models.causal_lm import CausalLM, Layer
from models.mixers import Mixer
from models.moe import MoE
from models.teaching import AttentionTransfer, Lesson
from parallel.comm import Comm
from parallel.cost import Key, SequenceCost, Traffic, expert_traffic, zero_traffic
from parallel.expert import is_expert
from parallel.hot_experts import HotExperts
from parallel.layout import SequenceLayout


class Forecast:
    """Enters into the ledger what this rank will send in each pass and each step.

    Build it before ZeRO partitions the parameters.
    """

    def __init__(
        self,
        model: CausalLM,
        optimizer: torch.optim.Optimizer,
        *,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        comm: Comm,
        lesson: Lesson | None = None,
    ) -> None:
        self._parallel, self._itemsize = parallel, dtype.itemsize
        self._ledger, self._mesh = comm.ledger, comm.mesh
        self._row_bytes = model.config.hidden_size * dtype.itemsize
        self._num_sinks = model.config.num_sinks
        self._tied = 0 if model.tied is None else model.tied.numel()
        self._recomputes_mixers = parallel.recompute == "full" and not isinstance(
            lesson, AttentionTransfer
        )
        groups = [group["params"] for group in optimizer.param_groups]
        shared_out = [[is_expert(p) and comm.mesh.ep.size > 1 for p in group] for group in groups]
        self._groups: dict[bool, list[list[int]]] = {}
        """Elements of each parameter by group, of experts that ranks share out and of all else."""
        for is_shared in (False, True):
            self._groups[is_shared] = [
                [p.numel() for p, mark in zip(group, marks, strict=True) if mark == is_shared]
                for group, marks in zip(groups, shared_out, strict=True)
            ]
        layers = [layer for _, layer in model.named_layers()]
        self._mixers = {"all": _mixers(layers), "learning": _mixers(layers), "known": []}
        """Those that an evaluation runs; those that a step differentiates; the teacher's."""
        if lesson is not None:
            self._mixers |= {
                "learning": _mixers(lesson.learning_layers()),
                "known": _mixers(lesson.known_layers()),
            }
        moe = [layer.ffn for layer in layers if isinstance(layer.ffn, MoE)]
        self._moe = [(ffn, ffn.expert_weights()) for ffn in moe if comm.mesh.ep.size > 1]
        self._last: tuple[SequenceLayout, dict[str, dict[str, Traffic]]] | None = None

    def add_step(
        self, layouts: Sequence[SequenceLayout], experts: HotExperts, *, applied: bool
    ) -> None:
        """Predict a step, with the new parameters only if it was applied.

        Args:
            layouts: of the micro batches.
            experts: what the step has asked of them, and their copies.
        """
        for layout in layouts:
            self._add_pass("forward", layout, "learning")
            self._add_pass("backward", layout, "learning")
            if self._mixers["known"]:
                self._add_pass("forward", layout, "known")
        self._add_experts(layouts, experts, is_step=True)
        for is_shared, axis in ((False, self._mesh.stage), (True, self._mesh.edp)):
            traffic = zero_traffic(
                self._groups[is_shared],
                num_ranks=axis.size,
                zero_stage=self._parallel.zero_stage,
                micro_batches=len(layouts),
                axis=axis.name,
            )
            self._enter(traffic.backward, "gradients")
            if applied:
                self._enter(traffic.forward, "parameters")
        if self._tied:
            # Two stages sum the gradients of the embedding that each of them has.
            self._ledger.predict("pp", "all_reduce", "gradients", 4 * self._tied)

    def add_evaluation(self, layouts: Sequence[SequenceLayout], experts: HotExperts) -> None:
        """Predict the passes of an evaluation.

        Args:
            layouts: of the micro batches.
            experts: what they have asked of them.
        """
        for layout in layouts:
            self._add_pass("forward", layout, "all")
        self._add_experts(layouts, experts, is_step=False)

    def _add_pass(
        self, direction: Literal["forward", "backward"], layout: SequenceLayout, mixers: str
    ) -> None:
        """Predict one pass over the tokens of a layout, but for what depends on the routers."""
        if self._last is None or self._last[0] != layout:
            # The backward pass follows the forward pass of the same micro batch.
            self._last = (layout, {key: self._by_kind(layout, key) for key in self._mixers})
        for kind, traffic in self._last[1][mixers].items():
            self._enter(getattr(traffic, direction), kind)
            for axis, _ in getattr(traffic, direction) if self._parallel.sync == "barrier" else ():
                self._ledger.predict(axis, "barrier", kind, 0)
        is_forward, pp = direction == "forward", self._mesh.pp
        if pp.index != (pp.size - 1 if is_forward else 0):
            rows = self._num_sinks + layout.num_tokens
            kind = "activations" if is_forward else "gradients"
            self._ledger.predict("pp", "send", kind, rows * self._row_bytes)

    def _add_experts(
        self, layouts: Sequence[SequenceLayout], experts: HotExperts, *, is_step: bool
    ) -> None:
        """Predict what the MoE layers send; an evaluation has no backward pass and no copies."""
        for i, (ffn, weights) in enumerate(self._moe):
            copied = experts.copied[:, i] if is_step else None
            demand = experts.rows[:, i, : ffn.config.num_experts]
            traffic = self._moe_traffic(ffn.config, weights, demand, layouts, copied)
            self._enter(traffic.forward, ffn.kind)
            if is_step:
                self._enter(traffic.backward, ffn.kind)
            if copied is not None and copied.any():
                without = self._moe_traffic(ffn.config, weights, demand, layouts, None)
                self._ledger.spared_bytes += without.total_bytes - traffic.total_bytes

    def _moe_traffic(
        self,
        config: MoEConfig,
        weights: int,
        demand: torch.Tensor,
        layouts: Sequence[SequenceLayout],
        copied: torch.Tensor | None,
    ) -> Traffic:
        parallel, passes = self._parallel, len(layouts)
        if config.capacity is not None and copied is not None:
            # Every rank sends as many rows for every expert, which none needs to be told.
            demand, passes = torch.full_like(demand, self._aligned_rows(config, layouts)), 0
        return expert_traffic(
            demand.tolist(),
            self._mesh.ep.index,
            row_bytes=self._row_bytes,
            passes=passes,
            recompute=parallel.recompute != "none" or parallel.moe_recompute == "layer",
            copied=None if copied is None else copied.tolist(),
            expert_bytes=(weights * self._itemsize, weights * 4),
        )

    def _aligned_rows(self, config: MoEConfig, layouts: Sequence[SequenceLayout]) -> int:
        """Return the rows of a rank for one expert, where length alignment makes them even."""
        assert config.capacity is not None, "there is a length to align to"
        longest = [self._num_sinks + max(map(x.count, range(x.sp_size))) for x in layouts]
        choices = [config.capacity * rows * config.top_k for rows in longest]
        return sum(math.ceil(n / config.num_experts) for n in choices)

    def _enter(self, sizes: Mapping[Key, int], kind: str) -> None:
        for (axis, collective), num_bytes in sizes.items():
            self._ledger.predict(axis, collective, kind, num_bytes)

    def _by_kind(self, layout: SequenceLayout, mixers: str) -> dict[str, Traffic]:
        parallel = self._parallel
        cost = SequenceCost(
            layout, parallel.linear, self._itemsize, recompute=self._recomputes_mixers
        )
        total: dict[str, Traffic] = {}
        for mixer in self._mixers[mixers]:
            total[mixer.kind] = total.get(mixer.kind, Traffic()) + mixer.traffic(cost)
        return total


def _mixers(layers: Iterable[Layer]) -> list[Mixer]:
    return [mixer for layer in layers for _, mixer in layer.mixer.named_branches()]
