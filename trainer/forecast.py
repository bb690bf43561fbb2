"""Predicts what a run sends, by walking the layer list with the formulas of `parallel.cost`."""

from typing import Literal

import torch

from conf.schema import ParallelConfig
from models.causal_lm import CausalLM
from parallel.comm import Comm
from parallel.cost import SequenceCost, Traffic, zero_traffic
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
    ) -> None:
        self._parallel, self._itemsize = parallel, dtype.itemsize
        self._ledger, self._num_ranks = comm.ledger, comm.mesh.stage.size
        self._groups = [[p.numel() for p in group["params"]] for group in optimizer.param_groups]
        self._mixers = [
            mixer
            for _, layer in model.named_layers()
            for _, mixer in layer.mixer.named_branches()
        ]
        self._last: tuple[SequenceLayout, dict[str, Traffic]] | None = None

    def add_step(self, micro_batches: int, *, applied: bool) -> None:
        """Predict the sum of the gradients and, if the step was applied, the new parameters."""
        traffic = zero_traffic(
            self._groups,
            num_ranks=self._num_ranks,
            zero_stage=self._parallel.zero_stage,
            micro_batches=micro_batches,
        )
        for (axis, collective), num_bytes in traffic.backward.items():
            self._ledger.predict(axis, collective, "gradients", num_bytes)
        for (axis, collective), num_bytes in traffic.forward.items() if applied else ():
            self._ledger.predict(axis, collective, "parameters", num_bytes)

    def add_pass(self, direction: Literal["forward", "backward"], layout: SequenceLayout) -> None:
        """Predict one pass over the tokens of a layout."""
        if self._last is None or self._last[0] != layout:
            # The backward pass follows the forward pass of the same micro batch.
            self._last = (layout, self._by_kind(layout))
        for kind, traffic in self._last[1].items():
            for (axis, collective), num_bytes in getattr(traffic, direction).items():
                self._ledger.predict(axis, collective, kind, num_bytes)
                if self._parallel.sync == "barrier":
                    self._ledger.predict(axis, "barrier", kind, 0)

    def _by_kind(self, layout: SequenceLayout) -> dict[str, Traffic]:
        parallel = self._parallel
        cost = SequenceCost(
            layout, parallel.linear, self._itemsize, recompute=parallel.recompute == "full"
        )
        total: dict[str, Traffic] = {}
        for mixer in self._mixers:
            total[mixer.kind] = total.get(mixer.kind, Traffic()) + mixer.traffic(cost)
        return total
