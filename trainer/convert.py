"""A run directory that begins with another run's weights, in a model of another kind."""

import dataclasses
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from conf.schema import Config, ConvertConfig
from models.causal_lm import CausalLM
from models.convert import Recipe, Upcycling, plan_conversion
from parallel.layout import Segment
from trainer.checkpoint import CheckpointStore, CheckpointWriteError, load_tensors
from trainer.checkpoint_tensors import CheckpointTensors, rows_name
from trainer.restore import find_run
from trainer.run_dir import save_config

logger = logging.getLogger(__name__)


def convert_run(config: ConvertConfig, *, max_shard_bytes: int = 2 * 10**9) -> Path:
    """Write a run directory with a checkpoint of step 0; return the checkpoint.

    Tensors are made one by one, so that no more than a shard and a tensor are in memory. The
    directory appears when all is written.

    Raises:
        ValueError: no sound checkpoint, models that do not match, or `out` is not empty.
        CheckpointWriteError: a file could not be written; nothing is left of it.
    """
    out = Path(config.out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={config.out} is not empty; name a folder that is absent or empty")
    logger.info("reading and checking %s", config.run)
    old, checkpoint = find_run(config.run)
    run = dataclasses.replace(old.run, dir=config.out, resume=config.out)
    new = dataclasses.replace(old, model=config.model, run=run)
    upcycling = Upcycling(config.router_std, old.run.seed)
    model = _build_on_meta(new)
    recipes = plan_conversion(_build_on_meta(old), model, [upcycling])
    total_bytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    shards = _pack(_make(recipes, load_tensors(checkpoint)), max_shard_bytes)
    working = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        _write(working / "checkpoints", shards, total_bytes)
        save_config(new, working)
        working.replace(out)
    except OSError as error:
        raise CheckpointWriteError(
            f"out={config.out} could not be written ({error}); nothing is left of it"
        ) from error
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return out / "checkpoints" / "step_00000000"


def _build_on_meta(config: Config) -> CausalLM:
    with torch.device("meta"):
        return CausalLM(config.model, config.spike, config.ops)


def _make(
    recipes: dict[str, Recipe], tensors: CheckpointTensors
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the new model's tensors by name, every copy of one as a row of its own."""
    for name, recipe in recipes.items():
        made = recipe.make(*(tensors.get(f"model/{source}") for source in recipe.sources))
        if recipe.copies is None:
            yield f"model/{name}", made
        for row in range(recipe.copies or 0):
            yield rows_name(f"model/{name}", Segment(row, row + 1)), made[None].clone()


def _pack(
    tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield shards of at most `max_bytes`, or of one tensor."""
    shard, room = dict[str, torch.Tensor](), max_bytes
    for name, tensor in tensors:
        if shard and tensor.nbytes > room:
            yield shard
            shard, room = {}, max_bytes
        shard[name] = tensor
        room -= tensor.nbytes
    yield shard


def _write(folder: Path, shards: Iterable[dict[str, torch.Tensor]], total_bytes: int) -> None:
    """Write the checkpoint of a run that has taken no step."""
    store, written = CheckpointStore(folder, keep=1), 0
    store.begin(0)
    for index, shard in enumerate(shards):
        store.write_shard(0, index, shard)
        written += sum(tensor.nbytes for tensor in shard.values())
        logger.info("%.3g of %.3g GB written", written / 1e9, total_bytes / 1e9)
    store.commit(0, {})
