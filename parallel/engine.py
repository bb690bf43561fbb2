"""The training engine: DeepSpeed owns the optimizer step (ZeRO 0-3, offload) on float32 parameters.

Gradients are averaged by DeepSpeed over all ranks, so a loss that is to be a mean over the global
tokens is scaled by world_size / global token count before `backward`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import nn

from conf.schema import OptimConfig, ParallelConfig
from parallel.flight_recorder import FlightRecorder
from parallel.ledger import Ledger
from parallel.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """A model and its optimizer under DeepSpeed."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        parallel: ParallelConfig,
        optim: OptimConfig,
        mesh: Mesh,
        recorder: FlightRecorder,
        grad_accum_steps: int,
        micro_batch_size: int,
    ) -> None:
        self.recorder = recorder
        self.zero_stage = parallel.zero_stage
        self.max_grad_norm = optim.max_grad_norm
        self.mesh = mesh
        self.model = model
        self._comm_seconds: dict[str, float] = {}
        # Its shared-memory collective compiles for half a minute at first use; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
        # DeepSpeed's own copy of this group would wait half an hour for a rank that is gone.
        deepspeed.utils.groups._WORLD_GROUP = dist.group.WORLD
        with self._watch("start of DeepSpeed"):
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=_deepspeed_config(parallel, optim, mesh, grad_accum_steps, micro_batch_size),
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

    def __call__(self, *inputs: Any) -> Any:
        """Run the model's forward pass."""
        if self.zero_stage < 3:
            return self._engine(*inputs)
        with self._watch("parameter gather of the forward pass"):
            return self._engine(*inputs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; the `last` micro batch of a step reduces over the ranks."""
        with self._watch("gradient reduction of the backward pass"):
            self._engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # counts the micro batch, applies nothing

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip and apply the gradients, unless one is not finite; every rank must call.

        Returns:
            The global L2 norm of the gradient before clipping, and whether weights were updated.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = math.nan
        if self.zero_stage == 0:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            total = torch.nn.utils.get_total_norm(gradients, foreach=True)
            norm = float(total)
            if not math.isfinite(norm):
                self.model.zero_grad(set_to_none=True)
            elif norm > self.max_grad_norm:
                torch._foreach_mul_(gradients, self.max_grad_norm / (norm + 1e-6))
        with self._watch("optimizer step"):
            self._engine.step()
        if self.zero_stage > 0:
            norm = float(self._engine.get_global_grad_norm() or 0.0)
            if getattr(self._engine.optimizer, "overflow", False):
                norm = math.inf
        return norm, math.isfinite(norm)

    def absorb_communication(self, ledger: Ledger, axis: str = "dp") -> None:
        """Move what DeepSpeed sent since the last call into the ledger, under `axis`."""
        log = deepspeed.comm.comm.comms_logger.comms_dict
        for operation, sizes in log.items():
            # The latencies are readings of one running timer per operation, in milliseconds.
            elapsed = max((max(record[1]) for record in sizes.values()), default=0.0) / 1000
            seconds = elapsed - self._comm_seconds.get(operation, 0.0)
            self._comm_seconds[operation] = elapsed
            logged: dict[str, list[int]] = {}
            for size, record in sizes.items():
                total = logged.setdefault(_payload_kind(operation, size), [0, 0])
                total[0] += record[0]
                total[1] += record[0] * size
            largest = max(logged, key=lambda kind: logged[kind][1])
            for kind, (calls, num_bytes) in logged.items():
                sent = _bytes_sent(operation, num_bytes, self.mesh.world_size)
                waited = seconds if kind == largest else 0.0
                ledger.record(axis, operation, sent, waited, calls, kind if axis == "dp" else "")
        log.clear()

    def full_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield every parameter's name and its float32 value and moments, whole.

        A collective under ZeRO: every rank must run through all of it, one parameter at a time.
        """
        for name, parameter in self.model.named_parameters():
            with self._watch(f"gather of {name}"):
                tensors = self._full_tensors(parameter)
            yield name, tensors

    def load_moments(self, step: int, moments: Callable[[str, str], torch.Tensor]) -> None:
        """Put back the optimizer's moments (the parameters are loaded before the engine starts).

        Args:
            step: steps the optimizer had applied.
            moments: maps ("exp_avg" or "exp_avg_sq", parameter name) to the whole tensor.
        """
        for state in self._optimizer.state.values():
            state["step"].fill_(step)
        if self.zero_stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.model.named_parameters():
            for moment in MOMENTS:
                value = moments(moment, name)
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


def _payload_kind(operation: str, size: int) -> str:
    """Name what a collective of DeepSpeed carries in a step; one or two numbers are no gradient."""
    if not size:
        return ""
    if size <= 8:
        return "scalars"
    return "gradients" if "reduce" in operation else "parameters"


def _bytes_sent(operation: str, num_bytes: int, size: int) -> int:
    """Return the bytes a rank sends of tensors logged with `num_bytes`, by rings over the ranks."""
    if "all_reduce" in operation:
        return 2 * (size - 1) * num_bytes // size
    if "broadcast" in operation:
        return (size > 1) * num_bytes // size  # one of `size` ranks sends it
    if "all_gather" in operation:
        return (size - 1) * num_bytes  # logged with the size of the rank's own part
    return (size - 1) * num_bytes // size


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
        "train_batch_size": micro_batch_size * grad_accum_steps * mesh.world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        # Under ZeRO 0 `Engine.step` clips, since DeepSpeed would apply a non-finite gradient there.
        "gradient_clipping": optim.max_grad_norm if parallel.zero_stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True},
    }
