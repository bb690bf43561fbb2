"""The training loop: Trainer builds the parts of one rank and takes steps until the run is done."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from conf.schema import Config
from models.causal_lm import WHOLE, CausalLM
from models.io import is_foreign
from models.moe import MoE, Routing
from parallel.comm import Comm
from parallel.engine import Engine
from parallel.flight_recorder import FlightRecorder
from parallel.hot_experts import HotExperts
from parallel.ledger import Ledger
from parallel.mesh import Mesh
from parallel.pipeline import ModelPart
from parallel.pipeline_engine import PipelinedEngine
from parallel.recompute import Recompute
from trainer.accelerator import Accelerator
from trainer.checkpoint import CheckpointStore, CheckpointWriteError, load_state, resolve
from trainer.data import Batch
from trainer.feed import Feed
from trainer.flops import FlopCounter, active_parameters, measure_peak_flops, parameters_by_kind
from trainer.forecast import Forecast
from trainer.model_state import load_moments, load_weights, own_shard
from trainer.objective import StepFlops, build_lesson, freeze, load_teacher
from trainer.optim import build_optimizer, learning_rate
from trainer.partition import choose_part
from trainer.profiler import StepProfiler
from trainer.progress import Progress
from trainer.record import Recorder, RunFacts
from trainer.statistics import RouterStatistics, SpikeStatistics

logger = logging.getLogger(__name__)

PROFILE_EVERY = 5
"""Every so many steps the time of each kind of layer is taken."""


class RunFailedError(RuntimeError):
    """The run cannot go on and starting it again would not help (exit code 3)."""


@dataclasses.dataclass
class TrainState:
    """All that resuming needs beside the weights and the optimizer's moments."""

    step: int = 0
    consumed: int = 0
    """Samples taken from the training split."""
    num_tokens: int = 0
    nonfinite_in_row: int = 0
    optimizer_steps: int = 0
    """Steps that changed the weights."""


class Trainer:
    """One rank of a training run.

    Args:
        config: the complete config, `run.dir` set and `dtype` resolved.
        mesh: this rank's place.
        accelerator: its device family.
    """

    def __init__(self, config: Config, mesh: Mesh, accelerator: Accelerator) -> None:
        assert config.run.dir is not None, "the launcher sets run.dir"
        self.config, self.mesh, self.accelerator = config, mesh, accelerator
        self.dtype = getattr(torch, config.dtype)
        self.run_dir = Path(config.run.dir)
        self.store = CheckpointStore(self.run_dir / "checkpoints", config.checkpoint.keep)
        self.ledger, self.state = Ledger(), TrainState()
        self.comm = Comm(
            mesh,
            self.ledger,
            FlightRecorder(self.run_dir / "flight_recorder", mesh.rank, mesh.world_size),
            config.parallel.sync,
        )
        self.profiler = StepProfiler(accelerator.synchronize)

        self.feed = Feed(config, self.comm)
        with torch.device("meta"):
            whole = self._new_model(WHOLE)
        flops = FlopCounter(whole)
        model = self._new_model(choose_part(flops, config, mesh)).to(mesh.device)
        checkpoint = self._find_checkpoint()
        if checkpoint is None:
            model.reset_parameters(config.run.seed)
        else:
            load_weights(model, checkpoint, seed=config.run.seed)
        teacher = self._load_teacher()
        freeze(model, config, teacher)
        self.lesson = build_lesson(config, model, teacher, self.profiler.kind)
        self.flops = StepFlops(flops, self.lesson)
        peak = measure_peak_flops(mesh.device, self.dtype)
        facts = RunFacts(
            parameters_by_kind(whole), active_parameters(whole), peak * mesh.world_size, accelerator
        )
        self.spikes = SpikeStatistics(whole, model)
        self.routers = RouterStatistics(whole, model)
        self.profiler.watch(model)
        optimizer = build_optimizer(model, config.optim)
        self.forecast = Forecast(
            model,
            optimizer,
            parallel=config.parallel,
            dtype=self.dtype,
            comm=self.comm,
            lesson=self.lesson,
        )
        # An evaluation counts the rows for each expert as well, and copies none.
        self.hot_experts, self.counted_experts = (
            self._new_hot_experts(model, count) for count in (config.parallel.hot_experts, 0)
        )
        build_engine = Engine if mesh.pp.size == 1 else PipelinedEngine
        self.engine = build_engine(
            model,
            optimizer,
            parallel=config.parallel,
            optim=config.optim,
            comm=self.comm,
            grad_accum_steps=self.feed.grad_accum_steps,
            micro_batch_size=config.data.micro_batch_size,
            lesson=self.lesson,
        )
        if checkpoint is not None and self.state.optimizer_steps:
            load_moments(self.engine, self.state.optimizer_steps, checkpoint)
        self.recorder = Recorder(config, self.comm, facts, self.profiler)
        self.recorder.start(self.state.step)

    def _new_model(self, part: ModelPart) -> CausalLM:
        config = self.config
        return CausalLM(
            config.model,
            config.spike,
            config.ops,
            dtype=self.dtype,
            recompute=Recompute.of(config.parallel),
            part=part,
            adapters=config.adapters,
        )

    def _new_hot_experts(self, model: CausalLM, max_copies: int) -> HotExperts:
        return HotExperts(
            {
                name: layer.ffn.experts.weights
                for name, layer in model.named_layers()
                if isinstance(layer.ffn, MoE) and self.mesh.ep.size > 1
            },
            hidden_size=self.config.model.hidden_size,
            dtype=self.dtype,
            max_copies=max_copies,
            micro_batches=self.feed.grad_accum_steps,
            comm=self.comm,
        )

    def fit(self) -> None:
        """Train until `run.steps`, then write the report.

        Raises:
            RunFailedError: too many steps in a row without a finite loss and gradient.
            CheckpointWriteError: a checkpoint could not be written.
        """
        run = self.config.run
        first = self.state.step
        with Progress(first, run.steps, run.log_every, enabled=self.mesh.rank == 0) as progress:
            while self.state.step < run.steps:
                record = self.train_step()
                self.recorder.log_step(record)
                progress.step(record)
                self._check_finite()
                step = self.state.step
                if step % self.config.evaluation.every == 0 or step == run.steps:
                    record = self.evaluate()
                    self.recorder.log_evaluation(record)
                    progress.evaluation(record)
                if step % self.config.checkpoint.every == 0 or step == run.steps:
                    self.save_checkpoint()
        self.feed.log_seen(self.state.consumed)
        self.recorder.finish()
        self.comm.recorder.close()

    def train_step(self) -> dict[str, Any]:
        """Take one optimizer step on the next global batch; every rank must call.

        Returns:
            The step's record for metrics.jsonl.
        """
        start = time.perf_counter()
        state = self.state
        state.step += 1
        self.comm.recorder.step = state.step
        lr = learning_rate(self.config.optim, state.step, self.config.run.steps)
        with self.profiler.step(state.step % PROFILE_EVERY == 0):
            with self.profiler.kind("data"):
                batches = self.feed.training(state.consumed)
            loss_sum, num_tokens = self._accumulate(batches)
            with self.profiler.kind("optimizer"):
                grad_norm, applied = self.engine.step(lr)
            with self.profiler.kind("communication"):
                totals, taught, spikes, routing = self._reduce(loss_sum, batches)
                self.hot_experts.end_step()
            self.accelerator.synchronize()
        if applied:
            self.routers.balance(routing)
        state.consumed += self.config.data.global_batch_size
        state.num_tokens += int(totals["tokens"])
        state.optimizer_steps += applied
        state.nonfinite_in_row = 0 if applied else state.nonfinite_in_row + 1
        layouts = [self.feed.layout(batch) for batch in batches]
        self.forecast.add_step(layouts, self.hot_experts, applied=applied)
        loss = totals["loss"] / num_tokens
        record: dict[str, Any] = {
            "step": state.step,
            "loss": loss if applied else None,
            "grad_norm": grad_norm if applied else None,
            "lr": lr,
            "num_tokens": state.num_tokens,
            "step_seconds": time.perf_counter() - start,
            "peak_memory_bytes": self.accelerator.peak_memory_bytes(),
            **self.routers.metrics(routing),
            "flops_by_kind": {k: totals[k] for k in self.flops.kinds},
            "hardware_flops": totals["hardware_flops"] + self.flops.recomputed(routing),
        }
        if applied and self.lesson is not None:
            record |= self.lesson.metrics(taught / num_tokens)
        if not applied:
            kind = "gradient" if math.isfinite(loss) else "loss"
            record |= {"skipped": True, "reason": f"non-finite {kind}"}
        record["routings"] = routing
        if spikes:
            record["spike_histograms"] = spikes
        return record

    def evaluate(self) -> dict[str, Any]:
        """Return the record of the loss over the validation sequences; every rank must call."""
        batches = self.feed.validation()
        with self.spikes.observing():
            loss_sum, num_valid = self.engine.evaluate(
                [self.feed.shard(batch, self.counted_experts) for batch in batches]
            )
        self.counted_experts.end_step()
        self.forecast.add_evaluation([self.feed.layout(b) for b in batches], self.counted_experts)
        num_bytes = sum(b.num_bytes for b in self.feed.counted(batches))
        sums = torch.stack([loss_sum, num_valid, loss_sum.new_tensor(num_bytes)])
        sums, spikes = self._sum(torch.cat([sums, self.spikes.take()])).cpu().tensor_split([3])
        loss, tokens, num_bytes = sums.tolist()
        return {
            "step": self.state.step,
            "val_loss": loss / tokens,
            "val_bits_per_byte": loss / math.log(2) / num_bytes,
            "spike_histograms": self.spikes.name(spikes),
            "spike_sample": self.spikes.sample(),
        }

    def save_checkpoint(self) -> None:
        """Write weights, moments and position; every rank must call.

        Raises:
            CheckpointWriteError: on every rank if one could not write; earlier ones are intact.
        """
        step, first = self.state.step, self.mesh.rank == 0
        self._write(lambda: self.store.begin(step), first)
        shard = own_shard(self.engine)
        self._write(lambda: self.store.write_shard(step, self.mesh.rank, shard))
        self.recorder.sync()
        state, num_shards = dataclasses.asdict(self.state), self.mesh.world_size
        self._write(lambda: self.store.commit(step, state, num_shards), first)
        logger.info("checkpoint: %s", self.store.folder / f"step_{step:08d}")
        self.recorder.flush()

    def _write(self, write: Callable[[], object], here: bool = True) -> None:
        """Write on the ranks that say `here`; if one cannot, every rank raises."""
        error = None
        try:
            if here:
                write()
        except CheckpointWriteError as raised:
            error = raised
        failed = torch.tensor([float(error is not None)], device=self.mesh.device)
        if float(self._sum(failed, "checkpoint")):
            if self.mesh.rank == 0:  # a rank that failed may have met another's new file
                self.store.abandon(self.state.step)
            raise error or CheckpointWriteError(
                "the checkpoint could not be written by another rank, whose log says why; "
                "earlier ones are intact"
            )

    def _find_checkpoint(self) -> Path | None:
        """Return the checkpoint to begin from, if there is one, and take the state to continue.

        The run's own newest one comes before the one that `run.resume` names to continue from, and
        that before the one whose weights alone are taken, `run.init_from`.
        """
        run = self.config.run
        own = None if run.resume == "never" else self._choose(self.store.latest)
        if own is None and run.resume not in ("auto", "never"):
            own = self._resolve(run.resume)
        if own is None:
            return self._resolve(run.init_from)
        self.state = TrainState(**load_state(own))
        logger.info("continuing from %s", own)
        return own

    def _load_teacher(self) -> CausalLM | None:
        path = self.config.objective.teacher
        if path is not None and not is_foreign(path):
            path = str(self._resolve(path))
        return None if path is None else load_teacher(self.config, path, self.mesh.device)

    def _resolve(self, path: str | None) -> Path | None:
        """Return the checkpoint of a run, or the one given; None for None."""
        return None if path is None else self._choose(lambda: resolve(path))

    def _choose(self, find: Callable[[], Path | None]) -> Path | None:
        """Return what the first rank finds, which reads every byte; every rank must call."""
        found = None
        try:
            if self.mesh.rank == 0:
                found = find()
        except ValueError as error:
            raise RunFailedError(str(error)) from error
        path = self.comm.broadcast_object(None if found is None else str(found))
        return None if path is None else Path(path)

    def _sum(self, x: torch.Tensor, name: str | None = None) -> torch.Tensor:
        """Return the sum over all ranks; every rank must call."""
        comm = self.comm if name else self.comm.at(kind="metrics")
        return comm.all_reduce_sum(x, self.mesh.world, name)

    def _accumulate(self, batches: list[Batch]) -> tuple[torch.Tensor, float]:
        """Run forward and backward of all micro batches.

        Returns:
            This rank's summed loss (float64) and the labels that count over all ranks.
        """
        local = float(sum((b.labels >= 0).sum() for b in self.feed.counted(batches)))
        num_tokens = float(
            self._sum(torch.tensor([local], dtype=torch.float64, device=self.mesh.device))
        )
        # DeepSpeed averages over the ranks of the stage.
        scale = self.mesh.stage.size / num_tokens
        shards = [self.feed.shard(batch, self.hot_experts) for batch in batches]
        loss_sum = self.engine.accumulate(shards, scale)
        return loss_sum, num_tokens

    def _reduce(
        self, loss_sum: torch.Tensor, batches: list[Batch]
    ) -> tuple[dict[str, float], torch.Tensor, dict[str, torch.Tensor], dict[str, Routing]]:
        """Sum over ranks: loss, tokens, FLOPs; what the lesson, spike encoders and routers saw."""
        lengths = [n for b in self.feed.counted(batches) for n in b.doc_lengths()]
        scalars = {
            "loss": float(loss_sum),
            "tokens": float(sum(lengths)),
            **self.flops.model(lengths),
            "hardware_flops": self.flops.hardware(lengths),
        }
        parts = [
            torch.tensor(list(scalars.values()), dtype=torch.float64, device=self.mesh.device),
            loss_sum.new_empty(0) if self.lesson is None else self.lesson.take(),
            self.spikes.take(),
            self.routers.take(),
        ]
        sums = self._sum(torch.cat(parts)).cpu().split([len(part) for part in parts])
        totals = dict(zip(scalars, sums[0].tolist(), strict=True))
        return totals, sums[1], self.spikes.name(sums[2]), self.routers.name(sums[3])

    def _check_finite(self) -> None:
        limit = self.config.run.max_nonfinite_steps
        if self.state.nonfinite_in_row < limit:
            return
        steps = self.store.steps()
        last = self.store.folder / f"step_{steps[-1]:08d}" if steps else "none was written"
        raise RunFailedError(
            f"{limit} steps in a row had a loss or gradient that is not finite "
            f"(run.max_nonfinite_steps={limit}); last good checkpoint: {last}"
        )
