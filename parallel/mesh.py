"""The mesh: this process's place among the ranks, by axis name. Built once, passed down."""

import atexit
import os
import socket
import time
from collections.abc import Sequence
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


class Groups:
    """The process groups by their ranks, so that no two groups have the same ones.

    Two groups over the same ranks could wait for each other.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timedelta(seconds=timeout_seconds)
        self._made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}

    def get(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Return the group over `ranks`; every rank of the world must call, in one order."""
        members = tuple(ranks)
        if members not in self._made:
            if len(members) == dist.get_world_size():
                self._made[members] = dist.group.WORLD
            else:
                self._made[members] = dist.new_group(list(members), timeout=self._timeout)
        return self._made[members]


@dataclass(frozen=True)
class Mesh:
    """Ranks and sizes by axis: rank = ((pp * dp + dp) * ring + ring) * ulysses + ulysses, where a
    name stands for the size of an axis before a `*` and for the place on it after a `+`.

    The ranks of the ring and of Ulysses together are the sequence axis `sp`. A stage of the
    pipeline is all ranks that hold the same layers; they sum their gradients, and `dp` in the
    ledger stands for them. `ep` neighbours of a stage share out the experts, and those with the
    same experts are `edp`, which sum the experts' gradients.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    groups: Groups | None = None
    """All that were made; None where there is one rank."""
    world: Axis = Axis("dp")
    stage: Axis = Axis("dp")
    pp: Axis = Axis("pp")
    ep: Axis = Axis("ep")
    edp: Axis = Axis("edp")
    sp: Axis = Axis("sp")
    ring: Axis = Axis("ring")
    ulysses: Axis = Axis("ulysses")
    ends: Axis = Axis("pp")
    """The first and the last stage, which share tied embeddings."""

    @property
    def dp_rank(self) -> int:
        return self.stage.index // self.sp_size

    @property
    def dp_size(self) -> int:
        return self.stage.size // self.sp_size

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
    pp: int = 1,
    ep: int = 1,
) -> Mesh:
    """Join the process group of the world, unless that was done before, and return the mesh.

    Every rank must call. DeepSpeed keeps the groups it has seen, so a process that makes several
    runs, one after another, keeps the one made here until it ends.

    Args:
        timeout_seconds: longest wait in one collective.
        ulysses: neighbouring ranks that exchange heads for tokens.
        ring: places of the ring.
        pp: stages of the pipeline; pp * ulysses * ring divides the world.
        ep: neighbours of a stage that share out the experts; divides the ranks of a stage.

    Raises:
        CommunicationError: not all ranks came in time.
    """
    try:
        if not dist.is_initialized():
            _join(world, backend, timeout_seconds)
        return _build_mesh(world, device, timeout_seconds, (pp, ep, ring, ulysses))
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
    world: World, device: torch.device, timeout_seconds: float, sizes: tuple[int, int, int, int]
) -> Mesh:
    pp, ep, ring, ulysses = sizes
    ranks = torch.arange(world.world_size)
    stages, sequences = ranks.view(pp, -1), ranks.view(-1, ring, ulysses)
    groups = Groups(timeout_seconds)

    def build_axis(name: str, rows: torch.Tensor) -> Axis:
        """Every rank makes the groups of all rows, in one order; this one's becomes the axis."""
        own: tuple[int, ...] = (world.rank,)
        group = None
        for row in rows.tolist():
            made = groups.get(row) if len(row) > 1 else None
            if world.rank in row:
                own, group = tuple(row), made
        return Axis(name, own, own.index(world.rank), group)

    return Mesh(
        world.rank,
        world.world_size,
        world.local_rank,
        device,
        groups,
        world=build_axis("dp" if pp == 1 else "world", ranks.view(1, -1)),
        stage=build_axis("dp", stages),
        pp=build_axis("pp", stages.T),
        ep=build_axis("ep", ranks.view(-1, ep)),
        edp=build_axis("edp", ranks.view(pp, -1, ep).transpose(1, 2).reshape(pp * ep, -1)),
        sp=build_axis("sp", sequences.flatten(1)),
        ring=build_axis("ring", sequences.transpose(1, 2).reshape(-1, ring)),
        ulysses=build_axis("ulysses", sequences.reshape(-1, ulysses)),
        ends=build_axis("pp", stages.T[:, sorted({0, pp - 1})]),
    )
