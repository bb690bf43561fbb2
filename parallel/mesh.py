"""The mesh: this process's place among the ranks, by axis name. Built once, passed down."""

import atexit
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.flight_recorder import CommunicationError, is_of_a_group

MEETING_PLACE = ("MASTER_ADDR", "MASTER_PORT")
"""Where the ranks find each other."""


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
    missing = [name for name in MEETING_PLACE if name not in os.environ]
    if missing and world.world_size > 1:
        raise ValueError(
            f"WORLD_SIZE={world.world_size} needs {' and '.join(missing)}, where the ranks meet; "
            "torchrun sets them"
        )
    return world


@dataclass(frozen=True)
class Axis:
    """The ranks of one axis of the mesh that work together with this process."""

    name: str
    ranks: tuple[int, ...] = (0,)
    """Ranks of the world, in the order of the axis."""
    index: int = 0
    """Which of them this process is."""
    group: dist.ProcessGroup | None = None
    """None where the axis has one rank."""

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Mesh:
    """Ranks and sizes by axis: rank = (dp_rank * ring + ring_rank) * ulysses + ulysses_rank.

    The ranks of the ring and of Ulysses together are the sequence axis `sp`. `dp` in the ledger
    stands for all ranks, over which gradients are summed.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    world: Axis = Axis("dp")
    sp: Axis = Axis("sp")
    ring: Axis = Axis("ring")
    ulysses: Axis = Axis("ulysses")

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp_size

    @property
    def dp_size(self) -> int:
        return self.world_size // self.sp_size

    @property
    def sp_rank(self) -> int:
        return self.sp.index

    @property
    def sp_size(self) -> int:
        return self.sp.size


def init_mesh(
    world: World,
    device: torch.device,
    backend: str,
    timeout_seconds: float,
    *,
    ulysses: int = 1,
    ring: int = 1,
) -> Mesh:
    """Join the process group of the world, unless that was done before, and return the mesh.

    Every rank must call. DeepSpeed keeps the groups it has seen, so a process that makes several
    runs, one after another, keeps the one made here until it ends.

    Args:
        timeout_seconds: longest wait in one collective.
        ulysses: neighbouring ranks that exchange heads for tokens.
        ring: places of the ring; ulysses * ring divides the world.

    Raises:
        CommunicationError: not all ranks came in time.
    """
    try:
        if not dist.is_initialized():
            _join(world, backend, timeout_seconds)
        return _build_mesh(world, device, timeout_seconds, ulysses, ring)
    except (RuntimeError, OSError) as error:
        if not isinstance(error, OSError) and not is_of_a_group(error):
            raise
        place = " ".join(f"{name}={os.environ.get(name)}" for name in MEETING_PLACE)
        raise CommunicationError(
            f"rank {world.rank}: the {world.world_size} ranks did not all meet at {place} within "
            f"parallel.timeout_seconds={timeout_seconds:g}: {str(error).splitlines()[0]}"
        ) from error


def close_mesh() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(world: World, backend: str, timeout_seconds: float) -> None:
    """Make the process group of the world."""
    atexit.register(close_mesh)
    timeout = timedelta(seconds=timeout_seconds)
    if world.world_size == 1:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    if world.rank:
        _await_meeting_place(timeout_seconds)
    dist.init_process_group(backend, rank=world.rank, world_size=world.world_size, timeout=timeout)


def _await_meeting_place(timeout_seconds: float) -> None:
    """Return when rank 0, or torchrun, listens: PyTorch waits in turns that can exceed the limit.

    Raises:
        OSError: nobody did in time.
    """
    host, port = (os.environ[name] for name in MEETING_PLACE)
    deadline = time.monotonic() + timeout_seconds
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, int(port)), timeout=max(0.1, left)).close()
            return
        except OSError:
            if left <= 0:
                raise
        time.sleep(0.02)


def _build_mesh(
    world: World, device: torch.device, timeout_seconds: float, ulysses: int, ring: int
) -> Mesh:
    ranks = torch.arange(world.world_size).view(-1, ring, ulysses)
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def build_axis(name: str, rows: torch.Tensor) -> Axis:
        """Every rank makes the groups of all rows, in one order; this one's becomes the axis."""
        own: tuple[int, ...] = (world.rank,)
        for row in rows.tolist():
            members = tuple(row)
            if world.rank in members:
                own = members
            if len(members) > 1 and members not in groups:
                # Two groups over the same ranks could wait for each other: one serves all axes.
                groups[members] = _group(members, world, timeout_seconds)
        return Axis(name, own, own.index(world.rank), groups.get(own))

    return Mesh(
        world.rank,
        world.world_size,
        world.local_rank,
        device,
        world=build_axis("dp", ranks.reshape(1, -1)),
        sp=build_axis("sp", ranks.flatten(1)),
        ring=build_axis("ring", ranks.transpose(1, 2).reshape(-1, ring)),
        ulysses=build_axis("ulysses", ranks.reshape(-1, ulysses)),
    )


def _group(members: tuple[int, ...], world: World, timeout_seconds: float) -> dist.ProcessGroup:
    if len(members) == world.world_size:
        whole = dist.group.WORLD
        assert whole is not None, "the process group of the world was made above"
        return whole
    group: dist.ProcessGroup = dist.new_group(
        list(members), timeout=timedelta(seconds=timeout_seconds)
    )
    return group
