"""Ranks for tests: worker processes that live for the session and meet anew for every job."""

import functools
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from helpers.poison import poison_uninitialized
from helpers.runs import start_server

from conf.schema import OpsConfig
from parallel.comm import Comm
from parallel.layout import build_layout
from parallel.ledger import Ledger
from parallel.mesh import Mesh, World, close_mesh, init_mesh
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


def run_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[Any]:
    """Call function(world, *arguments) on so many ranks at once and return what each returned.

    The ranks have joined their process group; the function may use `build_context`. What one rank
    raises ends the others and fails the test.

    Args:
        function: stands at the top of a module.
        timeout_seconds: longest wait in one collective.
    """
    pool = _pool()
    workers = pool.take(num_ranks)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for rank, worker in enumerate(workers):
                world = World(rank, num_ranks, rank, num_ranks)
                worker.send((world, f"{folder}/store", timeout_seconds, function, arguments))
            answers = [worker.receive() for worker in workers]
    except BaseException:
        # Also of a test's timeout: nobody would read the answers that are still to come.
        pool.close()
        raise
    errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
    if errors:
        pool.close()
    # Who lost the connection tells less than who ended it.
    errors.sort(key=lambda error: "CommunicationError" in error)
    assert not errors, "\n".join(errors)
    return [result for _, result in answers]


def build_context(
    world: World, setting: Setting, cu_seqlens: torch.Tensor, **fields: Any
) -> SequenceContext:
    """Return the context of a rank that shares the sequence `cu_seqlens` delimits.

    Args:
        fields: of the context, and `sync` of its collectives.
    """
    cpu, sync = torch.device("cpu"), fields.pop("sync", "none")
    mesh = Mesh(0, 1, 0, cpu)
    if world.world_size > 1:
        ulysses, ring = setting.ulysses, setting.ring
        mesh = init_mesh(world, cpu, "gloo", TIMEOUT_SECONDS, ulysses=ulysses, ring=ring)
        _wait_for_all()
    layout = build_layout(
        cu_seqlens,
        kind=setting.layout,  # type: ignore[arg-type]
        sp_rank=mesh.sp_rank,
        sp_size=mesh.sp_size,
        ulysses=setting.ulysses,
    )
    comm = Comm(mesh, Ledger(), sync=sync)
    fields = {"ops": OpsConfig(), "comm": comm, "linear": setting.linear} | fields
    return SequenceContext(layout, **fields)


class _Worker:
    """A process that does jobs until one fails."""

    def __init__(self) -> None:
        server = start_server()
        self._jobs, theirs = server.Pipe()
        work = (theirs, sys.path, dict(os.environ))
        self._process = server.Process(target=_work, args=work, daemon=True)
        self._process.start()
        theirs.close()  # or its end would not be seen here

    def send(self, job: tuple[Any, ...]) -> None:
        # Pickled as plain bytes: multiprocessing would share the memory of tensors, which is gone
        # with the process that made them.
        self._jobs.send_bytes(pickle.dumps(job))

    def receive(self) -> tuple[str, Any]:
        """Return the message of an error, or "" and the result."""
        try:
            answer: tuple[str, Any] = pickle.loads(self._jobs.recv_bytes())
        except (EOFError, ConnectionError):
            self._process.join()
            return f"the worker died with exit code {self._process.exitcode}", None
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._jobs.close()


class _Pool:
    """Workers by rank; the same ones serve all jobs."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def take(self, count: int) -> list[_Worker]:
        new = [_Worker() for _ in range(count - len(self._workers))]
        for worker in new:  # they start side by side, and all are there before they must meet
            error, _ = worker.receive()
            assert not error, error
        self._workers += new
        return self._workers[:count]

    def close(self) -> None:
        """End all workers; the next job gets new ones."""
        while self._workers:
            self._workers.pop().close()


@functools.cache
def _pool() -> _Pool:
    return _Pool()


def _work(jobs: Connection, path: list[str], env: dict[str, str]) -> None:
    """Be the process of a worker."""
    sys.path[:] = path
    os.environ.update(env)
    torch.set_num_threads(1)
    jobs.send_bytes(pickle.dumps(("", "ready")))
    while True:
        try:
            world, store, timeout_seconds, function, arguments = pickle.loads(jobs.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            _join(world, store, timeout_seconds)
            with poison_uninitialized():
                answer = pickle.dumps(("", function(world, *arguments)))
            close_mesh()
        except Exception:
            jobs.send_bytes(pickle.dumps((traceback.format_exc(), None)))
            # Closes the connections to the ranks that wait for this one.
            os._exit(1)
        jobs.send_bytes(answer)


def _join(world: World, store: str, timeout_seconds: float) -> None:
    """Meet over a file, which needs no free port and, unlike a socket, never keeps one waiting."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world.world_size),
        rank=world.rank,
        world_size=world.world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    _wait_for_all()


def _wait_for_all() -> None:
    """Return when all ranks have connected; one that ended before would look like a failure."""
    dist.barrier()
