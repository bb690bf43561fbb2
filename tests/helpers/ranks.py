"""Ranks for tests: worker processes that live for the session and meet anew for every job."""

import atexit
import functools
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from parallel.comm import Comm
from parallel.layout import build_layout
from parallel.ledger import Ledger
from parallel.mesh import World, close_mesh, init_mesh
from parallel.sequence import SequenceContext

TIMEOUT_SECONDS = 20.0


class Setting(NamedTuple):
    """How ranks share a sequence."""

    ulysses: int = 1
    ring: int = 1
    layout: str = "contiguous"
    linear: str = "gather"
    dp: int = 1

    @property
    def num_ranks(self) -> int:
        return self.ulysses * self.ring * self.dp

    @property
    def id(self) -> str:
        """Name for a test case."""
        return f"u{self.ulysses}-r{self.ring}-{self.layout}-{self.linear}" + (
            f"-dp{self.dp}" if self.dp > 1 else ""
        )


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call function(world, *arguments) on so many ranks at once and return what each returned.

    The function stands at the top of a module; it may use `build_context`. What one rank raises
    fails the test.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [_worker(rank) for rank in range(num_ranks)]
    for rank, worker in enumerate(workers):
        worker.send((World(rank, num_ranks, rank, num_ranks), port, function, arguments))
    results = [worker.recv() for worker in workers]
    errors = [result for ok, result in results if not ok]
    assert not errors, "\n".join(errors)
    return [result for _, result in results]


def build_context(
    world: World, setting: Setting, cu_seqlens: torch.Tensor, **fields: Any
) -> SequenceContext:
    """Return the context of a rank that shares the sequence `cu_seqlens` delimits."""
    mesh = init_mesh(
        world,
        torch.device("cpu"),
        "gloo",
        TIMEOUT_SECONDS,
        ulysses=setting.ulysses,
        ring=setting.ring,
    )
    layout = build_layout(
        cu_seqlens,
        kind=setting.layout,  # type: ignore[arg-type]
        sp_rank=mesh.sp_rank,
        sp_size=mesh.sp_size,
        ulysses=setting.ulysses,
    )
    from helpers.models import OPS

    fields = {"ops": OPS, "comm": Comm(mesh, Ledger()), "linear": setting.linear} | fields
    return SequenceContext(layout, **fields)


@functools.cache
def _worker(rank: int) -> Connection:
    """Start worker number `rank`; the same one serves all jobs."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, sys.path, dict(os.environ)), daemon=True)
    process.start()
    atexit.register(ours.close)
    return ours  # type: ignore[return-value]


def _work(jobs: Connection, path: list[str], env: dict[str, str]) -> None:
    sys.path[:] = path
    os.environ.update(env)
    torch.set_num_threads(1)
    while True:
        try:
            world, port, function, arguments = jobs.recv()
        except EOFError:
            return
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            torch.manual_seed(0)
            jobs.send((True, function(world, *arguments)))
        except Exception:
            jobs.send((False, f"rank {world.rank}: {traceback.format_exc()}"))
        finally:
            close_mesh()
