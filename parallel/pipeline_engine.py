"""The engine of a pipeline: DeepSpeed runs one forward, one backward (1F1B) over its stages.

A stage is a part of the layer list. Every rank reads the data for itself, so that what goes from
stage to stage are hidden states and their gradients alone.
"""

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import InferenceSchedule, OptimizerStep, TrainSchedule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import nn

from parallel.engine import Engine, MicroBatch, poison
from parallel.mesh import Mesh


class PipelinedEngine(Engine):
    """A stage of a model and its optimizer under DeepSpeed, ZeRO 0 or 1."""

    _engine: PipelineEngine

    def _prepare(self, model: nn.Module) -> nn.Module:
        self._stage = _Stage(model)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it was given
            return _Pipeline(self._stage, self.mesh)

    def accumulate(self, micro_batches: Sequence[MicroBatch], scale: float) -> torch.Tensor:
        self._stage.begin(micro_batches, scale)
        self._run(_Accumulate(len(micro_batches), self.mesh.pp.size, self.mesh.pp.index))
        return self._stage.sums[0]

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[torch.Tensor, torch.Tensor]:
        self._stage.begin(micro_batches, 1.0)
        self.model.eval()
        with torch.no_grad():
            self._run(InferenceSchedule(len(micro_batches), self.mesh.pp.size, self.mesh.pp.index))
        self.model.train()
        return self._stage.sums[0], self._stage.sums[1]

    def step(self, lr: float) -> tuple[float, bool]:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        norm = self._clip()
        with self._watch("optimizer step"):
            self._engine._exec_optimizer_step()
        return norm, math.isfinite(norm)

    def _run(self, schedule: Any) -> None:
        engine = self._engine
        engine.total_loss, engine._compute_loss = None, False
        engine.set_dataiterator(iter(self._stage.inputs()))
        with self._watch(f"pipeline, stage {self.mesh.pp.index + 1} of {self.mesh.pp.size}"):
            engine._exec_schedule(schedule)

    def _gradients(self) -> Iterator[tuple[torch.Tensor, bool]]:
        if self.zero_stage == 0:
            yield from super()._gradients()
            return
        wrapper = self._engine.optimizer
        for i, gradients in wrapper.averaged_gradients.items():
            for gradient, parameter in zip(gradients, wrapper.params_in_partition[i], strict=False):
                yield gradient, not getattr(parameter, "ds_pipe_replicated", False)


class _Accumulate(TrainSchedule):
    """1F1B without the optimizer step, before which the gradients are looked at."""

    def steps(self) -> Iterator[list[Any]]:
        for commands in super().steps():
            yield [command for command in commands if not isinstance(command, OptimizerStep)]


class _Stage(nn.Module):
    """Runs this rank's part of the model on micro batches in their order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sums = torch.zeros(2, dtype=torch.float64)
        self._micro_batches: Sequence[MicroBatch] = ()
        self._next, self._scale = 0, 1.0

    def begin(self, micro_batches: Sequence[MicroBatch], scale: float) -> None:
        """Start afresh with these."""
        self._micro_batches, self._next = micro_batches, 0
        # DeepSpeed divides by the number of micro batches.
        self._scale = scale * len(micro_batches)
        device = micro_batches[0].tokens.device
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def inputs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what DeepSpeed loads: tokens for the first stage and labels for the last."""
        return [(m.tokens, m.labels) for m in self._micro_batches]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return hidden states, or the scaled loss of the last stage, from tokens or states."""
        _, labels, context = self._micro_batches[self._next]
        self._next += 1
        out = self.model(x, labels, context)
        if isinstance(out, torch.Tensor):
            return out
        loss, num_valid = out
        self.sums += torch.stack([loss.detach().double(), num_valid.double()])
        return poison(loss) * self._scale


class _Pipeline(PipelineModule):
    """The stages as DeepSpeed's list of layers, one each, of which this rank builds its own."""

    def __init__(self, stage: _Stage, mesh: Mesh) -> None:
        layers = [stage if i == mesh.pp.index else _elsewhere for i in range(mesh.pp.size)]
        topology = PipeDataParallelTopology(num_pp=mesh.pp.size, num_dp=mesh.stage.size)
        super().__init__(layers, topology=topology, partition_method="uniform")
        self._ends = mesh.ends
        tied = stage.model.tied
        self._tied = [tied] if isinstance(tied, nn.Parameter) else []
        for weight in self._tied:
            weight.ds_pipe_replicated = mesh.ends.index > 0  # type: ignore[attr-defined]

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """Return the embedding where the first and the last stage share it."""
        return [(weight, self._ends.group) for weight in self._tied]


def _elsewhere(x: torch.Tensor) -> torch.Tensor:
    """Stand for the stage of another rank."""
    return x
