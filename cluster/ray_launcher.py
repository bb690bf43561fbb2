"""launcher=ray: the ranks are Ray Train workers; Ray is started inside the command."""

import logging
import sys
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.accelerators import load_accelerator
from cluster.env import apply_environment, rank_environment
from cluster.launch import DONE, FAILED, last_checkpoint, run_rank
from conf.schema import Config, build
from parallel.mesh import read_world
from trainer.accelerator import Accelerator
from trainer.run_dir import config_tree

logger = logging.getLogger(__name__)

OUTCOME = "outcome"
"""File in the run directory that holds the exit code of a run that ended by itself."""


def launch_on_ray(config: Config, accelerator: Accelerator) -> int:
    """Start Ray on this machine, run the workers, return the exit code.

    A worker that dies has all of them started again, at most `launcher.max_restarts` times; they
    continue from the newest checkpoint.
    """
    run_dir = Path(str(config.run.dir)).absolute()
    (run_dir / OUTCOME).unlink(missing_ok=True)
    root = str(Path(__file__).parents[1])
    variables = rank_environment(accelerator.deepspeed_name) | {
        "PYTHONPATH": root,
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    }
    apply_environment(variables)
    resource = "CPU" if accelerator.name == "cpu" else "GPU"
    ray.init(
        address="local",
        num_cpus=config.launcher.num_workers + 1,
        include_dashboard=False,
        log_to_driver=True,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": variables},
    )
    try:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"config": config_tree(config), "cwd": str(Path.cwd())},
            torch_config=TorchConfig(
                backend=accelerator.backend, timeout_s=int(config.parallel.timeout_seconds)
            ),
            scaling_config=ScalingConfig(
                num_workers=config.launcher.num_workers,
                use_gpu=resource == "GPU",
                resources_per_worker={resource: 1},
            ),
            run_config=RunConfig(
                name=run_dir.name,
                storage_path=str(run_dir / "ray"),
                failure_config=FailureConfig(max_failures=config.launcher.max_restarts),
            ),
        )
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        logger.error("%s; last complete checkpoint: %s", error, last_checkpoint(config))
        return FAILED
    finally:
        ray.shutdown()
    outcome = run_dir / OUTCOME
    return int(outcome.read_text()) if outcome.exists() else DONE


def train_worker(arguments: dict[str, Any]) -> None:
    """Train as one rank; Ray has set RANK, WORLD_SIZE and the process group."""
    import os

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    os.chdir(arguments["cwd"])
    config = build(Config, arguments["config"])
    accelerator = load_accelerator(config.accelerator.name)
    world = read_world()
    code = run_rank(config, accelerator, world)
    if world.rank == 0:
        (Path(str(config.run.dir)) / OUTCOME).write_text(str(code))
