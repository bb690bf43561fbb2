"""The training engine: DeepSpeed owns the optimizer step (ZeRO 0-3, offload) on float32 parameters.

Gradients are averaged by DeepSpeed over all ranks, so a loss that is to be a mean over the global
tokens is scaled by world_size / global token count before `backward`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import (
    groups,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import nn

from conf.schema import OptimConfig, ParallelConfig
from parallel.comm import Comm
from parallel.engine_backend import install_backend
from parallel.expert import is_expert
from parallel.mesh import Mesh
from parallel.sequence import SequenceContext

MOMENTS = ("exp_avg", "exp_avg_sq")


class MicroBatch(NamedTuple):
    """What a rank computes at a time."""

    tokens: torch.Tensor
    """int64 [1, T]."""
    labels: torch.Tensor
    """int64 [1, T], -100 where none."""
    context: SequenceContext


class Engine:
    """A model and its optimizer under DeepSpeed.

    Parameters without a gradient stay as they are: they have no moments and are not partitioned.
    `lesson`, a module that holds the model, runs in its place.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        parallel: ParallelConfig,
        optim: OptimConfig,
        comm: Comm,
        grad_accum_steps: int,
        micro_batch_size: int,
        lesson: nn.Module | None = None,
    ) -> None:
        self.comm, self.recorder, self.mesh = comm, comm.recorder, comm.mesh
        self.zero_stage = parallel.zero_stage
        self.max_grad_norm = optim.max_grad_norm
        self.model = model
        # Its shared-memory collective compiles for half a minute at first use; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.backend = install_backend(self.mesh, comm.ledger)
        groups._release_process_group_references()  # of an earlier run in this process
        _share_out_experts(model, optimizer, self.mesh)
        config = _deepspeed_config(parallel, optim, self.mesh, grad_accum_steps, micro_batch_size)
        with self._watch("start of DeepSpeed"):
            self._engine, *_ = deepspeed.initialize(
                model=self._prepare(model) if lesson is None else lesson,
                optimizer=optimizer,
                config=config,
                dist_init_required=False,
            )
        self._optimizer: torch.optim.Optimizer = self._engine.basic_optimizer
        for tensor in self._optimized_tensors():
            # Made at once rather than at the first step: DeepSpeed links to what is there then.
            self._optimizer.state[tensor] = {
                "step": torch.zeros((), device=tensor.device),
                **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
            }
        if self.zero_stage in (1, 2):
            # float32 is not checked by default; a non-finite norm must leave the weights alone.
            self._engine.optimizer.check_grad_overflow = True
            # It would reduce a norm of each of its groups of parameters over the stages, of which
            # only those with experts have one more; the norm over all stages is `_clip`'s.
            self._engine.optimizer.model_parallel_group = None
        self.backend.purpose = None

    def _prepare(self, model: nn.Module) -> nn.Module:
        """Return the module that DeepSpeed runs."""
        return model

    def accumulate(self, micro_batches: Sequence[MicroBatch], scale: float) -> torch.Tensor:
        """Add the gradients of a step, and sum them over the ranks; every rank must call.

        Args:
            micro_batches: as many as `grad_accum_steps`.
            scale: of the summed loss in what is differentiated; DeepSpeed averages over the ranks.

        Returns:
            The summed loss of this rank's tokens, a float64 scalar.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for i, micro_batch in enumerate(micro_batches):
            loss, _ = self._forward(micro_batch)
            with self._watch("gradient reduction of the backward pass"):
                self._engine.backward(poison(loss) * scale, scale_wrt_gas=False)
            if i < len(micro_batches) - 1:
                self._engine.step()  # counts the micro batch, applies nothing
            total += loss.detach().double()
        return total

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss of this rank's tokens and the labels that count, float64 scalars.

        Every rank must call, with equally many micro batches.
        """
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        with torch.no_grad():
            for micro_batch in micro_batches:
                loss_sum, num_valid = self._forward(micro_batch)
                sums += torch.stack([loss_sum.double(), num_valid.double()])
        self.model.train()
        return sums[0], sums[1]

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip and apply the gradients, unless one is not finite; every rank must call.

        Returns:
            The global L2 norm of the gradient before clipping, and whether weights were updated.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        norm = self._clip() if self.zero_stage == 0 else math.nan
        with self._watch("optimizer step"):
            self._engine.step()
        if self.zero_stage > 0:
            norm = float(self._engine.get_global_grad_norm() or 0.0)
            if getattr(self._engine.optimizer, "overflow", False):
                norm = math.inf
        return norm, math.isfinite(norm)

    def _clip(self) -> float:
        """Clip the summed gradients, clear them if one is not finite; return their norm."""
        gradients = list(self._gradients())
        mine = [gradient for gradient, counts in gradients if counts]
        norm = torch.nn.utils.get_total_norm(mine, foreach=True)
        square = norm.double().square().view(1).to(self.mesh.device)
        total = math.sqrt(
            float(self.comm.at(kind="scalars").all_reduce_sum(square, self.mesh.world))
        )
        if not math.isfinite(total):
            self.model.zero_grad(set_to_none=True)
            # ZeRO has its own hold of them: the stages whose gradients are finite skip as well.
            torch._foreach_mul_([gradient for gradient, _ in gradients], math.nan)
        elif total > self.max_grad_norm:
            scale = self.max_grad_norm / (total + 1e-6)
            torch._foreach_mul_([gradient for gradient, _ in gradients], scale)
        return total

    def _gradients(self) -> Iterator[tuple[torch.Tensor, bool]]:
        """Yield the gradients here, and whether this is the rank that counts them in the norm."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                axis = self.mesh.edp if is_expert(parameter) else self.mesh.stage
                is_copy = getattr(parameter, "ds_pipe_replicated", False)
                yield parameter.grad, axis.index == 0 and not is_copy

    def _forward(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        gathers = self._watch("parameter gather of the forward pass")
        with gathers if self.zero_stage == 3 else nullcontext():
            loss_sum, num_valid = self._engine(*micro_batch)
        return loss_sum, num_valid

    def full_state(self) -> Iterator[tuple[str, nn.Parameter, dict[str, torch.Tensor]]]:
        """Yield of every parameter here its name, itself, its float32 value and moments, if any.

        They are whole, but for experts, of which each rank has its own. A collective under ZeRO:
        every rank must run through all of it, one parameter at a time.
        """
        for name, parameter in self.model.named_parameters():
            with self._watch(f"gather of {name}"):
                tensors = self._full_tensors(parameter)
            yield name, parameter, tensors

    def load_moments(
        self, step: int, moments: Callable[[str, str, nn.Parameter], torch.Tensor]
    ) -> None:
        """Put back the optimizer's moments (the parameters are loaded before the engine starts).

        Args:
            step: steps the optimizer had applied.
            moments: maps "exp_avg" or "exp_avg_sq", a parameter's name and itself to the moment,
                whole, but for experts, of which it has those of this rank.
        """
        for state in self._optimizer.state.values():
            state["step"].fill_(step)
        if self.zero_stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        trained = ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
        for name, parameter in trained:
            for moment in MOMENTS:
                value = moments(moment, name, parameter)
                if self.zero_stage == 0:
                    self._optimizer.state[parameter][moment].copy_(value)
                elif self.zero_stage == 3:
                    size = safe_get_local_optimizer_state(parameter, moment).numel()
                    padded = nn.functional.pad(
                        value.flatten(), (0, size * self.mesh.world_size - value.numel())
                    )
                    part = padded.narrow(0, size * self.mesh.rank, size)
                    safe_set_local_optimizer_state(parameter, part, moment)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)

    def _watch(self, what: str) -> AbstractContextManager[None]:
        """Note what DeepSpeed does; if one of its collectives fails, all ranks' notes are told."""
        return self.recorder.watch(f"{what} (DeepSpeed, ZeRO {self.zero_stage})", is_pure=False)

    def _full_tensors(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        if not parameter.requires_grad:
            return {"model": parameter.detach()}
        if self.zero_stage == 0:
            state = self._optimizer.state[parameter]
            return {"model": parameter.detach(), **{moment: state[moment] for moment in MOMENTS}}
        return {
            "model": safe_get_full_fp32_param(parameter),
            **{moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS},
        }

    def _optimized_tensors(self) -> list[torch.Tensor]:
        """Return what the basic optimizer really updates: parameters, or ZeRO's flat partitions."""
        if self.zero_stage == 0:
            return [p for p in self.model.parameters() if p.requires_grad]
        wrapper = self._engine.optimizer
        if self.zero_stage == 3:
            return list(wrapper.fp32_partitioned_groups_flat)
        return list(wrapper.single_partition_of_fp32_groups)


def poison(loss: torch.Tensor) -> torch.Tensor:
    """Return the loss such that one that is not finite leaves no finite gradient behind."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


class _Experts(MoE):
    """Tells DeepSpeed that there are experts; ours dispatch for themselves."""

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Make no groups: they are those of the mesh."""


def _share_out_experts(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
    """Make DeepSpeed sum the gradients of experts over the ranks that hold the same ones."""
    if mesh.ep.size == 1:
        return
    assert mesh.groups is not None, "several ranks have groups"
    for rank in range(mesh.world_size):
        mesh.groups.get([rank])  # an expert that one rank holds is summed over that one
    name = f"ep_size_{mesh.ep.size}"
    groups._EXPERT_PARALLEL_GROUP[name] = mesh.ep.group
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = mesh.ep.ranks
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.groups.get(mesh.edp.ranks)
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = mesh.edp.ranks
    experts = [p for p in model.parameters() if is_expert(p)]
    if not experts:
        return
    for parameter in experts:
        parameter.allreduce, parameter.group_name = False, name  # type: ignore[attr-defined]
    model.add_module("_experts", _Experts(mesh.ep.size))
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if is_expert(p)]
        if mine:
            group["params"] = [p for p in group["params"] if not is_expert(p)]
            optimizer.param_groups.append({**group, "params": mine, "name": name, "moe": True})


def _deepspeed_config(
    parallel: ParallelConfig,
    optim: OptimConfig,
    mesh: Mesh,
    grad_accum_steps: int,
    micro_batch_size: int,
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": parallel.zero_stage, "overlap_comm": False}
    if parallel.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if parallel.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        # To DeepSpeed, sequence ranks are data ranks: its own sequence options reduce wrongly.
        "train_batch_size": micro_batch_size * grad_accum_steps * mesh.stage.size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        # Under ZeRO 0 `Engine.step` clips, since DeepSpeed would apply a non-finite gradient there.
        "gradient_clipping": optim.max_grad_norm if parallel.zero_stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }
