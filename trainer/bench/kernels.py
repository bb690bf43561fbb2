"""`suite=compile`: every Triton kernel, built for GPUs that need not be there.

A kernel that spills registers or asks for more shared memory than a block has there fails the
suite.
"""

import importlib
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context

from conf.schema import BenchConfig
from ops.catalog import OPERATORS
from ops.triton_build import TARGETS, compile_for
from trainer.accelerator import Accelerator
from trainer.bench.rows import Row

UNITS = {"registers": "per thread", "spilled_bytes": "B", "shared_bytes": "B", "code_bytes": "B"}


@dataclass(frozen=True)
class Job:
    """The index of one build among those of an operator and an architecture."""

    op: str
    arch: str
    index: int


@dataclass(frozen=True)
class Built:
    """What a build takes, or why it failed."""

    job: Job
    kernel: str
    case: str
    figures: dict[str, int]
    shared_limit: int
    error: str | None = None

    @property
    def problem(self) -> str | None:
        """Why this kernel does not ship; None if it does."""
        if self.error is not None:
            return self.error
        if spilled := self.figures["spilled_bytes"]:
            return f"spills {spilled} bytes of registers"
        if (shared := self.figures["shared_bytes"]) > self.shared_limit:
            return f"needs {shared} bytes of shared memory of {self.shared_limit}"
        return None

    def __str__(self) -> str:
        return f"{self.job.arch} {self.kernel} {self.case}"


def triton_operators(wanted: list[str]) -> list[str]:
    """Return the operators that have a Triton implementation, of `wanted` or of all."""
    return [
        op
        for op, table in OPERATORS.items()
        if (not wanted or op in wanted) and any(row.name == "triton" for row in table)
    ]


def bench_compile(config: BenchConfig, accelerator: Accelerator, peak: float) -> Iterator[Row]:
    """Yield four rows for each kernel, case and architecture; print a line for each.

    Raises:
        RuntimeError: some kernel failed, spills or does not fit, after all have been tried.
    """
    problems = []
    print(
        f"{'architecture, kernel, case':64s} {'registers':>9s} {'spills':>7s} {'shared':>7s}  code"
    )
    for built in build_all(config):
        if built.problem is not None:
            problems.append(f"{built}: {built.problem}")
        if built.error is not None:
            print(f"{built!s:64s} {built.error}")
            continue
        print("{!s:64s} {:9d} {:7d} {:7d} {:6d}".format(built, *built.figures.values()))
        for metric, value in built.figures.items():
            yield Row(str(built), metric, value, UNITS[metric])
    if problems:
        raise RuntimeError("kernels that cannot ship:\n" + "\n".join(problems))


def build_all(config: BenchConfig) -> Iterator[Built]:
    """Compile what `config.operators`, `config.archs` and `config.cases` select, in processes."""
    jobs = []
    for op in triton_operators(config.operators):
        builds = importlib.import_module(f"ops.{op}.triton_impl").list_builds
        for arch in config.archs:
            for index, build in enumerate(builds(arch)):
                name = f"{arch} {build.kernel.__name__} {build.case}"
                if config.cases is None or re.search(config.cases, name):
                    jobs.append(Job(op, arch, index))
    with ProcessPoolExecutor(config.num_threads, get_context("spawn")) as pool:
        yield from pool.map(build_one, jobs, chunksize=4)


def build_one(job: Job) -> Built:
    """Compile one kernel; an exception of the compiler is its result."""
    build = importlib.import_module(f"ops.{job.op}.triton_impl").list_builds(job.arch)[job.index]
    name, limit = build.kernel.__name__, TARGETS[job.arch].shared_bytes
    try:
        figures = asdict(compile_for(build, job.arch))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Built(job, name, build.case, {}, limit, reason)
    return Built(job, name, build.case, figures, limit)
