"""The mesh: this process's place among the ranks, by axis name. Built once, passed down."""

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """What a launcher tells a rank, before any process group exists."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int = 1
    """Ranks on this host."""


def read_world() -> World:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; one rank where they are not set.

    Raises:
        ValueError: a variable is not a number, the rank is outside the world, or there are several
            ranks and no MASTER_ADDR and MASTER_PORT to meet at.
    """
    try:
        world = World(
            int(os.environ.get("RANK", "0")),
            int(os.environ.get("WORLD_SIZE", "1")),
            int(os.environ.get("LOCAL_RANK", "0")),
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
    except ValueError as error:
        raise ValueError(
            f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be integers: {error}"
        ) from error
    if not 0 <= world.rank < world.world_size:
        raise ValueError(f"RANK={world.rank} must be in 0..WORLD_SIZE-1={world.world_size - 1}")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and world.world_size > 1:
        raise ValueError(
            f"WORLD_SIZE={world.world_size} needs {' and '.join(missing)}, where the ranks meet; "
            "torchrun sets them"
        )
    return world


@dataclass(frozen=True)
class Mesh:
    """Ranks and sizes by axis. The data axis (`dp`) is the whole world so far; `sp` is one rank."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def dp_rank(self) -> int:
        return self.rank

    @property
    def dp_size(self) -> int:
        return self.world_size

    @property
    def sp_rank(self) -> int:
        return 0

    @property
    def sp_size(self) -> int:
        return 1


def init_mesh(world: World, device: torch.device, backend: str, timeout_seconds: float) -> Mesh:
    """Join the process group of the world, unless that was done before, and return the mesh.

    DeepSpeed keeps the groups it has seen, so a process that makes several runs, one after another,
    keeps the one made here until it ends.
    """
    if not dist.is_initialized():
        atexit.register(close_mesh)
        timeout = timedelta(seconds=timeout_seconds)
        if world.world_size == 1:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
        else:
            dist.init_process_group(
                backend, rank=world.rank, world_size=world.world_size, timeout=timeout
            )
    return Mesh(world.rank, world.world_size, world.local_rank, device)


def close_mesh() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
