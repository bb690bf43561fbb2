"""launcher=ray: the ranks are Ray Train workers; Ray is started inside the command."""

import dataclasses
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.accelerators import load_accelerator
from cluster.env import configure_logging, rank_environment, ray_environment
from cluster.launch import FAILED, last_checkpoint, run_rank
from conf.schema import Config, build
from parallel.flight_recorder import CommunicationError
from parallel.mesh import read_world
from trainer.accelerator import Accelerator
from trainer.run_dir import config_tree

logger = logging.getLogger(__name__)


class RankLostError(RuntimeError):
    """A worker waited in vain for another one."""


def launch_on_ray(config: Config, accelerator: Accelerator) -> int:
    """Start Ray on this machine, run the workers, return the exit code.

    A worker that dies has all of them started again, at most `launcher.max_restarts` times; they
    continue from the newest checkpoint.
    """
    if config.run.resume == "never":  # the run directory was new when the command started
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume="auto"))
    logger.info("starting Ray and %d workers", config.launcher.num_workers)
    ray.init(
        address="local",
        num_cpus=config.launcher.num_workers,
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": rank_environment(accelerator.deepspeed_name) | ray_environment()},
    )
    try:
        with tempfile.TemporaryDirectory(prefix="longaxon-ray-") as scratch:
            return _run_workers(config, accelerator, Path(scratch))
    except ray.train.TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.RankLostError: ")
        logger.error("%s; last complete checkpoint: %s", reason, last_checkpoint(config))
        return FAILED
    finally:
        ray.shutdown()


def _run_workers(config: Config, accelerator: Accelerator, scratch: Path) -> int:
    """Train with Ray Train, which wants a folder of its own; return rank 0's exit code."""
    outcome = scratch / "outcome"
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config_tree(config),
            "cwd": str(Path.cwd()),
            "outcome": str(outcome),
        },
        torch_config=TorchConfig(
            backend=accelerator.backend, timeout_s=math.ceil(config.parallel.timeout_seconds)
        ),
        scaling_config=ScalingConfig(
            num_workers=config.launcher.num_workers,
            use_gpu=accelerator.name != "cpu",
            resources_per_worker={"CPU" if accelerator.name == "cpu" else "GPU": 1},
        ),
        run_config=RunConfig(
            name="run",
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=config.launcher.max_restarts),
            logging_config=LoggingConfig("WARNING"),
        ),
    )
    try:
        trainer.fit()
    except SystemExit as interrupted:  # Ray's own answer to an interrupt
        raise KeyboardInterrupt from interrupted
    if not outcome.exists():
        raise KeyboardInterrupt  # answered by ending the workers
    return int(outcome.read_text())


def train_worker(arguments: dict[str, Any]) -> None:
    """Train as one rank; Ray has set RANK, WORLD_SIZE and the process group.

    A run that failed for good ends like one that is done, so that Ray does not start it again.

    Raises:
        RankLostError: another rank died or stopped, which a new start may mend.
    """
    world = read_world()
    configure_logging(world.rank)
    os.chdir(arguments["cwd"])
    config = build(Config, arguments["config"])
    try:
        code = run_rank(config, load_accelerator(config.accelerator.name), world)
    except CommunicationError:
        # The rank has told what happened; Ray prints all of what it is given, and starts anew.
        raise RankLostError(f"rank {world.rank} lost another rank, see above") from None
    if world.rank == 0:
        Path(arguments["outcome"]).write_text(str(code))
