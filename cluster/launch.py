"""Get the ranks of a training run: this process, ranks that exist already, or Ray workers."""

import dataclasses
import logging
import os
from pathlib import Path

import torch

from cluster.env import apply_environment, configure_logging, rank_environment, ray_environment
from conf.schema import Config
from parallel.mesh import World, read_world
from trainer.accelerator import Accelerator
from trainer.checkpoint import CheckpointStore, CheckpointWriteError

logger = logging.getLogger(__name__)

DONE, FAILED = 0, 3


def launch(config: Config, accelerator: Accelerator, *, keeps_world: bool = False) -> int:
    """Run a checked config on the ranks of its launcher; return the exit code.

    Args:
        keeps_world: ranks that exist already stay together for another run, see `leave_world`.
    """
    is_synchronized = config.parallel.sync != "none"
    apply_environment(rank_environment(accelerator.deepspeed_name, is_synchronized=is_synchronized))
    if config.launcher.name == "ray":
        apply_environment(ray_environment())
        from cluster.ray_launcher import launch_on_ray

        return launch_on_ray(config, accelerator)
    world = World(0, 1, 0) if config.launcher.name == "inline" else read_world()
    return run_rank(config, accelerator, world, keeps_world=keeps_world)


def run_rank(
    config: Config, accelerator: Accelerator, world: World, *, keeps_world: bool = False
) -> int:
    """Train as one rank of the world; return the exit code.

    Raises:
        CommunicationError: another rank died, stopped or did not come; the message is logged.
    """
    configure_logging(world.rank)
    apply_environment({"LOCAL_RANK": str(world.local_rank)})  # DeepSpeed insists on it
    threads = config.run.num_threads or max(1, (os.cpu_count() or 1) // world.local_size)
    torch.set_num_threads(threads)
    # Imported here: the checks that come before must be quick, and DeepSpeed reads the environment.
    from parallel.comm import Comm
    from parallel.flight_recorder import CommunicationError, FlightRecorder
    from parallel.mesh import close_mesh, init_mesh
    from trainer.loop import RunFailedError, Trainer

    parallel, trainer = config.parallel, None
    try:
        mesh = init_mesh(
            world,
            accelerator.device(world.local_rank),
            accelerator.backend,
            parallel.timeout_seconds,
            ulysses=parallel.ulysses,
            ring=parallel.ring,
            pp=parallel.pp,
            ep=parallel.ep,
        )
        comm = Comm(mesh, recorder=FlightRecorder(None, mesh.rank, mesh.world_size))
        run_dir = comm.broadcast_object(config.run.dir, "the run directory")
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=run_dir))
        trainer = Trainer(config, mesh, accelerator)
        trainer.fit()
    except (RunFailedError, CheckpointWriteError) as error:
        if world.rank == 0 or isinstance(error, CheckpointWriteError):
            logger.error("%s", error)
        if trainer is not None:
            trainer.recorder.fail(interrupted=False)
        return FAILED
    except BaseException as error:
        if isinstance(error, CommunicationError):
            # Every rank tells its own; its log says which rank it is, unless it is the first.
            text = str(error).removeprefix(f"rank {world.rank}: " if world.rank else "")
            logger.error("%s\n  last complete checkpoint: %s", text, last_checkpoint(config))
        if trainer is not None:
            trainer.recorder.fail(interrupted=isinstance(error, KeyboardInterrupt))
        raise
    finally:
        if (
            world.world_size > 1 and not keeps_world
        ):  # a single rank may have another run to do, see init_mesh
            close_mesh()
    return DONE


def leave_world() -> None:
    """Part from the other ranks after runs that kept the world; one rank alone stays, as ever."""
    from parallel.mesh import close_mesh

    if read_world().world_size > 1:
        close_mesh()


def last_checkpoint(config: Config) -> str:
    """Return the newest complete checkpoint of a run, for messages."""
    if config.run.dir is None:
        return "unknown, the first rank has not told the run directory"
    store = CheckpointStore(Path(str(config.run.dir)) / "checkpoints", config.checkpoint.keep)
    steps = store.steps()
    return str(store.folder / f"step_{steps[-1]:08d}") if steps else "none was written"
