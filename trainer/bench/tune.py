"""`suite=tune`: search the block sizes of Triton kernels and write them to conf/blocks/.

For each kernel and size the candidates of its `SEARCH` are built for the architecture; those that
spill or do not fit are dropped, the others timed through the whole operator, forward and backward.
Without the GPU nothing can be timed: the suite says which candidates fit, and the static choice
of the file stays.
"""

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import yaml

from conf.schema import BenchConfig
from ops.triton_build import TARGETS
from ops.triton_runtime import Blocks, arch_of, find_rows, settings_file, trying
from trainer.accelerator import Accelerator
from trainer.bench.kernels import Job, build_one, triton_operators
from trainer.bench.rows import Row, median_seconds
from trainer.bench.tune_cases import build_case

TOKENS = 8192


def bench_tune(config: BenchConfig, accelerator: Accelerator, peak: float) -> Iterator[Row]:
    """Yield the best time of each kernel and size; without the GPU how many candidates fit.

    Raises:
        ValueError: the GPU here is none of those that kernels are built for.
    """
    device, dtype = accelerator.device(0), getattr(torch, config.dtype)
    is_gpu = device.type != "cpu"
    archs = [arch_of(device)] if is_gpu else config.archs
    if unknown := set(archs) - TARGETS.keys():
        raise ValueError(f"{unknown} is not among {', '.join(TARGETS)}; add it to TARGETS")
    for search in find_searches(config.operators, archs):
        fitting = [candidate for candidate in search.candidates if fits(search, candidate)]
        print(f"{search}: {len(fitting)} of {len(search.candidates)} candidates fit")
        yield Row(str(search), "candidates_that_fit", len(fitting), "candidates")
        if is_gpu and fitting:
            compute = build_case(search.op, search.kernel, search.size, TOKENS, dtype, device)
            best, seconds = fastest(search, fitting, compute, config.repeats, accelerator)
            write_row(search, best)
            print(f"{search}: {best} takes {seconds * 1e3:.3f} ms")
            yield Row(str(search), "seconds", seconds, "s")
    if not is_gpu:
        print("no GPU here: nothing was timed, conf/blocks/ keeps its static choices")


@dataclass(frozen=True)
class Search:
    """One row of conf/blocks/<op>.yaml and what could stand there."""

    op: str
    arch: str
    kernel: str
    size: int
    candidates: tuple[Blocks, ...]

    def __str__(self) -> str:
        return f"{self.arch} {self.op}.{self.kernel} size {self.size}"


def find_searches(operators: list[str], archs: Iterable[str]) -> Iterator[Search]:
    """Yield the searches of operators (none: all) on architectures."""
    for op in triton_operators(operators):
        candidates = importlib.import_module(f"ops.{op}.triton_impl").SEARCH
        for arch, kernel in itertools.product(archs, candidates):
            for size in find_rows(op, kernel, arch):
                yield Search(op, arch, kernel, size, candidates[kernel])


def fits(search: Search, candidate: Blocks) -> bool:
    """Return whether every build that takes the candidate can ship."""
    list_builds = importlib.import_module(f"ops.{search.op}.triton_impl").list_builds
    standing = list_builds(search.arch)
    with trying(search.op, search.kernel, search.size, candidate):
        builds = list_builds(search.arch)
        changed = [i for i, build in enumerate(builds) if build.blocks != standing[i].blocks]
        return all(build_one(Job(search.op, search.arch, i)).problem is None for i in changed)


def fastest(
    search: Search,
    candidates: list[Blocks],
    compute: Callable[[], object],
    repeats: int,
    accelerator: Accelerator,
) -> tuple[Blocks, float]:
    """Return the candidate with the least median time, and that time in seconds."""

    def run(candidate: Blocks) -> Callable[[], None]:
        def side() -> None:
            with trying(search.op, search.kernel, search.size, candidate):
                compute()

        return side

    sides = [run(candidate) for candidate in candidates]
    seconds = median_seconds(sides, repeats, accelerator.synchronize)
    best = min(range(len(candidates)), key=seconds.__getitem__)
    return candidates[best], seconds[best]


def write_row(search: Search, best: Blocks) -> None:
    """Write a row for the architecture, one line for each row, under the comment of the file."""
    file = settings_file(search.op)
    text = file.read_text()
    settings = yaml.safe_load(text)
    settings[search.kernel].setdefault(search.arch, {})[search.size] = best
    lines = [line for line in text.splitlines() if line.startswith("#")]
    for kernel, archs in settings.items():
        lines.append(f"{kernel}:")
        for arch, rows in archs.items():
            lines.append(f"  {arch}:")
            for size, row in sorted(rows.items()):
                values = ", ".join(f"{name}: {value}" for name, value in row.items())
                lines.append(f"    {size}: {{{values}}}")
    unfinished = file.with_suffix(".partial")
    unfinished.write_text("\n".join(lines) + "\n")
    unfinished.replace(file)
