"""Weights and moments between a rank's part of a model and the checkpoints, which know no parts.

A rank that holds some of the experts writes and reads those rows; all else is whole.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models.causal_lm import CausalLM
from models.lora import Adapter, adapters_of
from parallel.expert import is_expert
from parallel.layout import Segment
from parallel.pipeline import ModelPart
from trainer.checkpoint import load_tensors
from trainer.checkpoint_adapters import MergedTensors
from trainer.checkpoint_tensors import CheckpointDamaged, CheckpointTensors, rows_name

if TYPE_CHECKING:  # evaluation and generation do without DeepSpeed
    from parallel.engine import Engine


def load_weights(model: CausalLM, checkpoint: Path, *, seed: int | None = None) -> None:
    """Read the parameters, and the state of routers.

    An adapter that the checkpoint has goes on. What else it has of adapters is merged into their
    weights.

    Args:
        seed: draws the adapters that it does not have; None: it must have all.

    Raises:
        CheckpointDamaged: one is missing, or is not as large as in the model.
    """
    given = load_tensors(checkpoint)
    adapters = {f"{name}.adapter": adapter for name, _, adapter in adapters_of(model)}
    kept = {n for n, adapter in adapters.items() if seed is None or _has(given, n, adapter)}
    tensors = MergedTensors(given, kept)
    if seed is not None and len(kept) < len(adapters):
        model.reset_adapters(seed)
    with torch.no_grad():
        for name, mine in (*model.named_parameters(), *model.named_buffers()):
            if name.rpartition(".")[0] in adapters.keys() - kept:
                continue
            found = _read(tensors, f"model/{name}", mine, model.part)
            if found.shape != mine.shape:  # which would be repeated where it has one row
                raise CheckpointDamaged(
                    f"{checkpoint}: {name!r} has shape {list(found.shape)} and not the model's "
                    f"{list(mine.shape)}; use the model config of the run that wrote it"
                )
            if found.is_floating_point() != mine.is_floating_point():
                raise ValueError(
                    f"{checkpoint}: {name!r} is {found.dtype}, which this model cannot begin with; "
                    "use the run that was quantized"
                )
            mine.copy_(found)


def load_moments(engine: "Engine", step: int, checkpoint: Path) -> None:
    """Read the optimizer's moments after `step` steps that it has applied."""
    tensors = load_tensors(checkpoint)
    part = engine.model.part
    assert isinstance(part, ModelPart)
    engine.load_moments(step, lambda moment, name, p: _read(tensors, f"{moment}/{name}", p, part))


def own_shard(engine: "Engine") -> dict[str, torch.Tensor]:
    """Return what this rank writes of a checkpoint; every rank must call.

    What several ranks hold is shared out among them.
    """
    mesh, shard = engine.mesh, {}
    part = engine.model.part
    assert isinstance(part, ModelPart)
    engine.backend.purpose = "checkpoint"
    for i, (name, parameter, tensors) in enumerate(engine.full_state()):
        axis = mesh.edp if is_expert(parameter) else mesh.stage
        is_copy = getattr(parameter, "ds_pipe_replicated", False)
        if i % axis.size == axis.index and not is_copy:
            for kind, tensor in tensors.items():
                key = f"{kind}/{name}"
                if is_expert(parameter):
                    key = rows_name(key, _own_rows(len(tensor), part))
                shard[key] = tensor.cpu().clone()
    engine.backend.purpose = None
    if mesh.stage.index == 0:
        shard |= {f"model/{name}": b.cpu().clone() for name, b in engine.model.named_buffers()}
    return shard


def _has(tensors: CheckpointTensors, name: str, adapter: Adapter) -> bool:
    """Return whether the checkpoint has an adapter of the same shape and scale."""
    shapes = [tensors.shapes.get(f"model/{name}.{part}") for part in ("a", "b")]
    return shapes == [adapter.a.shape, adapter.b.shape] and bool(
        tensors.get(f"model/{name}.scale") == adapter.scale.cpu()
    )


def _read(
    tensors: CheckpointTensors | MergedTensors, name: str, parameter: torch.Tensor, part: ModelPart
) -> torch.Tensor:
    if not is_expert(parameter) or name not in tensors.shapes:
        return tensors.get(name)
    # Not by the parameter, of which ZeRO 3 has left nothing here.
    return tensors.get(name, _own_rows(tensors.shapes[name][0] // part.ep_size, part))


def _own_rows(count: int, part: ModelPart) -> Segment:
    return Segment(0, count).shift(count * part.ep_rank)
