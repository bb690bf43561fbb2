"""Run the command with a model that takes milliseconds, in processes that can be killed.

They are forked from a server that has the imports behind it, so that one starts in a tenth of a
second, and what they run is the command itself. `longaxon` starts a fresh process instead.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any
from unittest import mock

import torch

PRELOAD = [
    "cluster.cli", "cluster.accelerators.cpu", "cluster.launch", "trainer.checks", "trainer.loop",
    "setuptools", "torch._dynamo", "torch.utils.cpp_extension", "deepspeed",
    "deepspeed.runtime.bf16_optimizer", "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2",
]  # fmt: skip

TINY = (
    "model.hidden_size=32", "model.num_layers=3", "model.ffns.dense.intermediate_size=48",
    "model.mixers.linear.num_heads=2", "model.mixers.linear.num_kv_heads=1",
    "model.mixers.linear.head_dim=16", "model.mixers.linear.gate_rank=4",
    "model.mixers.window.num_heads=2", "model.mixers.window.num_kv_heads=1",
    "model.mixers.window.head_dim=16", "model.mixers.window.window_size=16",
    "data.seq_len=32", "data.global_batch_size=4", "data.micro_batch_size=2",
    "run.num_threads=1", "run.log_every=1", "run.steps=4", "dtype=float32", "tracking=none",
    "optim.warmup_steps=2", "evaluation.max_sequences=5",
)  # fmt: skip
"""A hybrid of all kinds of layers with 30,000 parameters."""

VARYING = ("step_seconds", "tokens_per_second", "mfu", "hfu", "peak_memory_bytes")
"""Keys of metrics.jsonl that depend on the machine."""


def tiny(folder: Path, *overrides: str) -> list[str]:
    """Return the arguments of a tiny training run whose data and token cache are in `folder`."""
    corpus = folder / "corpus.txt.jsonl"
    if not corpus.exists():
        corpus.write_text("".join(json.dumps({"text": t}) + "\n" for t in _documents()))
    data = ("data=text", f"data.path={corpus}", f"data.cache_dir={folder / 'cache'}")
    return ["train", *data, *TINY, *overrides]


def _documents() -> list[str]:
    rng = random.Random(0)
    words = ["axon", "spike", "long", "state", "window", "gate", "ring", "token"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(150)]


@dataclass(frozen=True)
class Faults:
    """What goes wrong in a run, on purpose."""

    poisoned: str = "loss"
    """What is not finite in `steps`: the loss, or the gradient alone."""
    steps: tuple[int, ...] = ()
    max_file_bytes: int | None = None
    """A file that grows beyond this fails to be written, as on a full disk."""
    halt: tuple[str, str, int] | None = None
    """Signal that the process sends itself, at the start of which collective, in which step."""


class Run:
    """The command in a process of its own; kill it, or wait for its exit code."""

    def __init__(
        self,
        arguments: list[str],
        cwd: Path,
        env: dict[str, str] | None = None,
        faults: Faults | None = None,
    ) -> None:
        handle, name = tempfile.mkstemp(dir=cwd, suffix=".log")
        os.close(handle)
        self._log = Path(name)
        work = (arguments, str(cwd), env or {}, faults or Faults(), name)
        self.process = start_server().Process(target=_run_command, args=work, daemon=True)
        self.process.start()

    def wait(self, timeout: float = 120) -> int:
        """Return the exit code, negative for a signal."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s:\n{self.log}"
        return self.process.exitcode

    @property
    def log(self) -> str:
        """What it has written to the console."""
        return self._log.read_text()


def run(arguments: list[str], cwd: Path, *, expect: int = 0, faults: Faults | None = None) -> str:
    """Run the command to its end, check its exit code and return what it wrote to the console."""
    started = Run(arguments, cwd, faults=faults)
    assert started.wait() == expect, started.log
    return started.log


def start_ranks(arguments: list[str], cwd: Path, faults: Sequence[Faults | None]) -> list[Run]:
    """Start the command as torchrun would, one rank for each entry of `faults`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": str(len(faults)), "LOCAL_WORLD_SIZE": str(len(faults))}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Run([*arguments, "launcher=env"], cwd, env | {"RANK": str(i), "LOCAL_RANK": str(i)}, fault)
        for i, fault in enumerate(faults)
    ]


def run_ranks(
    arguments: list[str],
    cwd: Path,
    *,
    faults: Sequence[Faults | None] = (None, None),
    expect: int = 0,
) -> list[str]:
    """Run ranks to their end, check their exit codes and return what each wrote to the console."""
    ranks = start_ranks(arguments, cwd, faults)
    codes = [rank.wait() for rank in ranks]
    assert codes == [expect] * len(ranks), "\n".join(rank.log for rank in ranks)
    return [rank.log for rank in ranks]


def longaxon(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a fresh process, without Triton's interpreter."""
    command = [Path(sys.executable).with_name("longaxon"), *arguments]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False
    )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what depends on the machine."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in VARYING} for record in records]


def column(run_dir: Path, key: str) -> list[float]:
    """Return one metric over the steps that have it."""
    return [record[key] for record in read_metrics(run_dir) if key in record]


def start_server() -> ForkServerContext:
    """Return the context whose processes are forked from the server, which is started if needed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # Read when the server imports DeepSpeed and Triton, whatever a test has done to them by then.
    env = {"DS_ACCELERATOR": "cpu"}
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    with mock.patch.dict(os.environ, env):
        ensure_running()
    return context


def _run_command(
    arguments: list[str], cwd: str, env: dict[str, str], faults: Faults, log: str
) -> None:
    """Be the process: in a folder, with an environment, writing to a log."""
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(cwd)
    os.environ.update(env)
    from cluster.cli import run as run_command

    _inject(faults)
    sys.exit(run_command(arguments))


def _inject(faults: Faults) -> None:
    """Put the faults in place, and a constant for the second that measuring the peak takes."""
    import trainer.loop as loop
    from models.causal_lm import CausalLM

    mock.patch.object(loop, "measure_peak_flops", return_value=1e11).start()
    forward = CausalLM.forward

    def poisoned(self: CausalLM, tokens: Any, labels: Any, context: Any) -> Any:
        out = forward(self, tokens, labels, context)
        is_due = self.training and context.comm.recorder.step in faults.steps
        if not is_due or isinstance(out, torch.Tensor):  # a stage before the last one
            return out
        loss_sum, num_valid = out
        if faults.poisoned == "loss":
            return loss_sum * float("inf"), num_valid
        loss_sum.register_hook(lambda gradient: gradient * float("nan"))
        return loss_sum, num_valid

    mock.patch.object(CausalLM, "forward", poisoned).start()
    if faults.halt is not None:
        _halt(*faults.halt)
    if faults.max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (faults.max_file_bytes,) * 2)


def _halt(signal_name: str, collective: str, step: int) -> None:
    """Send the signal when the flight recorder notes that the collective begins."""
    from parallel.flight_recorder import FlightRecorder

    begin = FlightRecorder._begin

    def halting(self: FlightRecorder, what: str, is_noted: bool) -> None:
        begin(self, what, is_noted)
        if is_noted and what.startswith(collective) and self.step == step:
            os.kill(os.getpid(), getattr(signal, signal_name))

    mock.patch.object(FlightRecorder, "_begin", halting).start()
