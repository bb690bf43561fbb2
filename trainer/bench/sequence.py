"""Every sequence-parallel algorithm on ranks of this machine: bytes, memory and seconds.

`torchrun` starts the ranks, which run this file; the threads are shared out among them, so that
seconds compare with one rank on the same cores.
"""

import json
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from conf.schema import BenchConfig, OpsConfig
from parallel.comm import Comm
from parallel.cost import SequenceCost, Traffic
from parallel.layout import build_layout
from parallel.ledger import Ledger
from parallel.mesh import Mesh, World, close_mesh, init_mesh, read_world
from parallel.sequence import SequenceContext, attention, delta_rule, linear_attention
from trainer.accelerator import Accelerator
from trainer.bench.memory import peak_allocated_bytes, saved_bytes
from trainer.bench.rows import Row, median_seconds

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, WINDOW_SIZE = 8, 4, 64, 256
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Case:
    """An algorithm and how it shares the sequence."""

    name: str
    mixer: str
    is_ulysses: bool = False
    layout: Literal["contiguous", "zigzag"] = "contiguous"
    linear: Literal["gather", "scan"] = "gather"


CASES = (
    Case("Ulysses", "full", is_ulysses=True),
    Case("ring contiguous", "full"),
    Case("ring zigzag", "full", layout="zigzag"),
    Case("halo", "window"),
    Case("linear gather", "linear"),
    Case("linear scan", "linear", linear="scan"),
    Case("delta rule gather", "delta"),
    Case("delta rule scan", "delta", linear="scan"),
)


@dataclass(frozen=True)
class Figures:
    """What one rank measured of one case, forward and backward."""

    bytes_sent: int
    predicted_bytes: int
    saved_bytes: int
    """Kept for the backward pass."""
    peak_bytes: int
    seconds: float
    """Until the slowest rank is done."""
    waiting_seconds: float


def bench_sequence(config: BenchConfig, accelerator: Accelerator, peak: float) -> Iterator[Row]:
    """Yield bytes sent beside the formula, and memory and seconds beside those of one rank."""
    alone = _measure_cases(config, accelerator, World(0, 1, 0))
    for num_ranks in config.ranks:
        ranks = _start_ranks(config, accelerator, num_ranks)
        for index, (case, one) in enumerate(zip(_select(config), alone, strict=True)):
            figures = [each[index] for each in ranks]
            yield from _rows(f"{case.name}, {config.seq_len} tokens", one, figures)


def _rows(case: str, one: Figures, ranks: list[Figures]) -> Iterator[Row]:
    """Report the rank with the most of each."""
    num_ranks = len(ranks)
    case = f"{case}, {num_ranks} ranks"
    most = max(ranks, key=lambda rank: rank.bytes_sent)
    for metric, value, peer, peer_value in (
        ("bytes_sent", most.bytes_sent, "formula", most.predicted_bytes),
        ("saved_bytes", max(r.saved_bytes for r in ranks), "share of 1 rank", one.saved_bytes),
        ("peak_bytes", max(r.peak_bytes for r in ranks), "share of 1 rank", one.peak_bytes),
    ):
        share = peer_value / num_ranks if "share" in peer else float(peer_value)
        yield Row(case, metric, value, "bytes", peer, share, share / value if value else None)
    seconds = max(rank.seconds for rank in ranks)
    yield Row(case, "seconds", seconds, "s", "1 rank", one.seconds, one.seconds / seconds)
    yield Row(case, "waiting_seconds", max(rank.waiting_seconds for rank in ranks), "s")


def _start_ranks(
    config: BenchConfig, accelerator: Accelerator, num_ranks: int
) -> list[list[Figures]]:
    """Return what every rank measured of every case."""
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder, "task.pickle")
        task.write_bytes(pickle.dumps((config, accelerator)))
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        command = [sys.executable, "-m", *torchrun, "-m", "trainer.bench.sequence", str(task)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"a rank of {num_ranks} failed:\n{done.stderr[-4000:]}")
        texts = [_results_file(task, rank).read_text() for rank in range(num_ranks)]
    return [[Figures(**figures) for figures in json.loads(text)] for text in texts]


def _results_file(task: Path, rank: int) -> Path:
    return task.with_name(f"rank{rank}.json")


def _run_rank(task: Path) -> None:
    """Measure the cases as one of the ranks that `torchrun` has started."""
    config, accelerator = pickle.loads(task.read_bytes())
    world = read_world()
    torch.set_num_threads(max(1, config.num_threads // world.world_size))
    figures = _measure_cases(config, accelerator, world)
    _results_file(task, world.rank).write_text(json.dumps([asdict(each) for each in figures]))
    close_mesh()  # while its threads can still be told


def _measure_cases(config: BenchConfig, accelerator: Accelerator, world: World) -> list[Figures]:
    cases = _select(config)
    return [_measure(case, config, _mesh(case, accelerator, world)) for case in cases]


def _select(config: BenchConfig) -> list[Case]:
    return [case for case in CASES if re.search(config.cases or "", case.name)]


def _mesh(case: Case, accelerator: Accelerator, world: World) -> Mesh:
    """Return a mesh whose ranks share one sequence; one rank needs no process group."""
    device = accelerator.device(world.local_rank)
    if world.world_size == 1:
        return Mesh(0, 1, 0, device)
    ulysses = world.world_size if case.is_ulysses else 1
    return init_mesh(
        world,
        device,
        accelerator.backend,
        TIMEOUT_SECONDS,
        ulysses=ulysses,
        ring=world.world_size // ulysses,
    )


def _measure(case: Case, config: BenchConfig, mesh: Mesh) -> Figures:
    ledger = Ledger()
    layout = build_layout(
        torch.tensor([0, config.seq_len], dtype=torch.int32),
        kind=case.layout,
        sp_rank=mesh.sp_rank,
        sp_size=mesh.sp_size,
        ulysses=mesh.ulysses.size,
    )
    context = SequenceContext(layout, OpsConfig(), Comm(mesh, ledger), case.linear)
    dtype = getattr(torch, config.dtype)
    inputs, forward = _build(case, context, dtype)
    dout = torch.randn_like(inputs[0])

    def step() -> None:
        torch.autograd.grad(forward(), inputs, dout)

    def meet() -> None:
        if mesh.device.type != "cpu":
            torch.accelerator.synchronize(mesh.device)
        Comm(mesh).all_reduce_sum(torch.zeros(1, device=mesh.device), mesh.world)

    saved = saved_bytes(forward)
    peak = peak_allocated_bytes(step, mesh.device)
    ledger.entries.clear()
    (seconds,) = median_seconds([step], config.repeats, meet)
    entries, steps = ledger.entries.values(), config.repeats + 1
    traffic = _predict(case, SequenceCost(layout, case.linear, dtype.itemsize))
    return Figures(
        sum(entry.bytes for entry in entries) // steps,
        sum(traffic.forward.values()) + sum(traffic.backward.values()),
        saved,
        peak,
        seconds,
        sum(entry.seconds for entry in entries) / steps,
    )


def _build(
    case: Case, context: SequenceContext, dtype: torch.dtype
) -> tuple[list[torch.Tensor], Callable[[], torch.Tensor]]:
    """Return this rank's inputs, q first, and a function of them."""
    device, num_tokens = context.comm.mesh.device, context.layout.num_tokens

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, num_tokens, *shape, device=device)

    q, k, v = draw(NUM_HEADS, HEAD_DIM), draw(NUM_KV_HEADS, HEAD_DIM), draw(NUM_KV_HEADS, HEAD_DIM)
    if case.mixer == "delta":
        k = torch.nn.functional.normalize(k, dim=3)
    q, k, v = inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    if case.mixer in ("full", "window"):
        window_size = WINDOW_SIZE if case.mixer == "window" else None
        return inputs, lambda: attention(q, k, v, context, window_size=window_size)
    if case.mixer == "linear":
        decay = (-draw(NUM_KV_HEADS, HEAD_DIM).abs() / 10).requires_grad_()
        return [*inputs, decay], lambda: linear_attention(q, k, v, decay, context)[0]
    decay = (-draw(NUM_KV_HEADS).abs() / 10).requires_grad_()
    beta = draw(NUM_KV_HEADS).sigmoid().to(dtype).requires_grad_()
    inputs = [*inputs, beta, decay]
    return inputs, lambda: delta_rule(q, k, v, beta, decay, context)[0]


def _predict(case: Case, cost: SequenceCost) -> Traffic:
    if case.mixer in ("full", "window"):
        window_size = WINDOW_SIZE if case.mixer == "window" else None
        return cost.attention(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, window_size)
    sizes = (NUM_KV_HEADS, HEAD_DIM, HEAD_DIM)
    return cost.recurrent(*sizes, "vector" if case.mixer == "linear" else "dense")


if __name__ == "__main__":
    _run_rank(Path(sys.argv[1]))
