"""A run directory that begins with given weights: what conversion and quantization write."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from conf.schema import Config
from trainer.checkpoint import CheckpointStore, CheckpointWriteError
from trainer.run_dir import save_config

logger = logging.getLogger(__name__)


def check_out(out: str) -> None:
    """Raise ValueError unless the folder is absent or empty."""
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"out={out} is not empty; name a folder that is absent or empty")


def write_run(
    config: Config,
    tensors: Iterable[tuple[str, torch.Tensor]],
    out: str,
    *,
    total_bytes: int,
    save_more: Callable[[Path], None] | None = None,
    max_shard_bytes: int = 2 * 10**9,
) -> Path:
    """Write config.yaml and a checkpoint of step 0; return the checkpoint.

    Tensors are taken one by one, so that no more than a shard and a tensor are in memory. The
    directory appears when all is written.

    Args:
        tensors: by name, as in model/norm.weight.
        save_more: writes what else belongs into the directory.

    Raises:
        CheckpointWriteError: a file could not be written; nothing is left of it.
    """
    path = Path(out).absolute()
    working = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        _write(working / "checkpoints", _pack(tensors, max_shard_bytes), total_bytes)
        if save_more is not None:
            save_more(working)
        save_config(config, working)
        working.replace(path)
    except OSError as error:
        raise CheckpointWriteError(
            f"out={out} could not be written ({error}); nothing is left of it"
        ) from error
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return path / "checkpoints" / "step_00000000"


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
