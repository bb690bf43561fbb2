"""The verb `train`: one run, or the stages of a chain one after the other."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster.accelerators import load_accelerator
from cluster.launch import DONE, FAILED, last_checkpoint, launch, leave_world
from conf.schema import Config, ModelConfig, StageError
from models.io import is_foreign, read_foreign
from parallel.flight_recorder import CommunicationError
from parallel.mesh import read_world
from trainer.accelerator import Accelerator
from trainer.checkpoint import CheckpointWriteError, resolve
from trainer.checks import check_config
from trainer.data import open_data
from trainer.run_dir import FINISHED, TOKENIZER, open_folder, open_run_dir, save_tree
from trainer.stages import (
    Stage,
    check_unchanged,
    format_summary,
    plan_stages,
    planned_models,
    write_summary,
)

logger = logging.getLogger(__name__)


def train_run(config: Config) -> int:
    """Check the config, then train; return the exit code."""
    config, accelerator = _check(config, {})
    return _run(config, accelerator)


def train_stages(tree: dict[str, Any]) -> int:
    """Check the configs of all stages, then train one after the other; return the exit code.

    The same command continues with the stage that was cut short.

    Raises:
        StageError: a stage cannot run; nothing was started.
        ValueError: the config of the whole chain is wrong.
    """
    is_env = tree["launcher"]["name"] == "env"
    if is_env and tree["run"]["dir"] is None:
        raise ValueError("run.dir=null: stages with launcher=env need one that all ranks know")
    if tree["run"]["resume"] not in ("auto", "never"):
        raise ValueError(
            f"run.resume={tree['run']['resume']}: a chain of stages continues by itself; use "
            "run.resume=auto, and run.init_from for the weights that it begins with"
        )
    with TemporaryDirectory() as scratch:
        folder = Path(tree["run"]["dir"] or f"{scratch}/run")
        tokenizer = folder / TOKENIZER
        place = tokenizer if tokenizer.exists() else Path(scratch)
        _check_stages(plan_stages(_with_tokenizer(tree, place), folder))
    if not is_env or read_world().rank == 0:
        run_dir, _lock = open_folder(tree)
        save_tree(tree | {"run": tree["run"] | {"dir": str(run_dir)}}, run_dir)
        logger.info("run directory: %s", run_dir)
    else:
        run_dir = Path(tree["run"]["dir"])
    stages = plan_stages(_with_tokenizer(tree, run_dir / TOKENIZER), run_dir)
    try:
        return _run_stages(stages, run_dir)
    finally:
        leave_world()


def _run_stages(stages: list[Stage], run_dir: Path) -> int:
    is_first = read_world().rank == 0
    for number, stage in enumerate(stages, start=1):
        what = f"stage {number} of {len(stages)}, {stage.name}"
        if stage.is_done:
            logger.info("%s: done before (%s)", what, stage.folder)
            continue
        logger.info("%s: %s", what, stage.folder)
        code = _run_stage(stage)
        if code != DONE:
            logger.error("%s failed; the same command continues with it", what)
            return code
        if is_first:
            write_summary(stages, run_dir)
    if is_first:
        logger.info("%s", format_summary(write_summary(stages, run_dir)))
        (run_dir / FINISHED).touch()
    return DONE


def _run_stage(stage: Stage) -> int:
    if stage.convert is None:
        return _run(*_resolve(stage.config), keeps_world=True)
    if read_world().rank:
        return DONE  # the first rank converts; the next run waits for it
    from trainer.convert import convert_run

    try:
        converted = convert_run(stage.convert, stage.config)
    except CheckpointWriteError as error:
        logger.error("%s", error)
        return FAILED
    except ValueError as error:
        raise StageError(stage.name, error) from error
    logger.info("%s", converted.conversion.summary_table())
    return DONE


def _check_stages(stages: list[Stage]) -> None:
    for i, stage in enumerate(stages):
        try:
            if stage.convert is not None:
                _check_source(stage, stages[:i])
                continue
            config, _ = _check(stage.config, planned_models(stages[:i]))
            check_unchanged(dataclasses.replace(stage, config=config))
            _prepare_data(config)
        except ValueError as error:
            raise StageError(stage.name, error) from error


def _check_source(stage: Stage, before: list[Stage]) -> None:
    assert stage.convert is not None, "there is something to convert"
    source = stage.convert.source
    if stage.is_done or source in planned_models(before):
        return
    if is_foreign(source):
        read_foreign(source)
    else:
        resolve(source)


def _resolve(config: Config) -> tuple[Config, Accelerator]:
    """Return the config with its dtype chosen, and the accelerator."""
    accelerator = load_accelerator(config.accelerator.name)
    if config.dtype == "auto":
        fast = accelerator.prefers_bfloat16()
        config = dataclasses.replace(config, dtype="bfloat16" if fast else "float32")
    return config, accelerator


def _check(config: Config, later: Mapping[str, ModelConfig]) -> tuple[Config, Accelerator]:
    config, accelerator = _resolve(config)
    is_env = config.launcher.name == "env"
    world_size = read_world().world_size if is_env else config.launcher.num_workers
    check_config(config, accelerator, world_size, later=later)
    return config, accelerator


def _run(config: Config, accelerator: Accelerator, *, keeps_world: bool = False) -> int:
    """Open the run directory and train; return the exit code."""
    if config.launcher.name != "env" or read_world().rank == 0:
        config, run_dir, _lock = open_run_dir(config)
        if not keeps_world:
            logger.info("run directory: %s", run_dir)
    _prepare_data(config)
    try:
        return launch(config, accelerator, keeps_world=keeps_world)
    except CommunicationError:
        return FAILED  # told by the rank
    except Exception:
        logger.exception("the run failed; last complete checkpoint: %s", last_checkpoint(config))
        return FAILED


def _prepare_data(config: Config) -> None:
    """Tokenise the data, unless that was done; ValueError if there is too little of it."""
    for split in ("train", "val"):
        open_data(config.data, split, config.run.seed)


def _with_tokenizer(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the tree with the tokenizer of a foreign checkpoint as one of ours, in `folder`."""
    name = tree["data"]["tokenizer"]
    if name == "bytes" or not is_foreign(name):
        return tree
    if not (folder / "tokenizer.json").exists():
        read_foreign(name).save_tokenizer(folder)
    return tree | {"data": tree["data"] | {"tokenizer": str(folder)}}
