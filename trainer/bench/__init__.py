"""`longaxon bench`: suites that measure, each next to a peer where there is one."""

import importlib
import json
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from conf.schema import BenchConfig
from ops.catalog import OPERATORS
from trainer.accelerator import Accelerator
from trainer.bench.rows import HEADER, Row
from trainer.flops import measure_peak_flops

SUITES = {
    "train_step": "trainer.bench.train_step:bench_train_step",
    "decode": "trainer.bench.decode:bench_decode",
    "recall": "trainer.bench.recall:bench_recall",
    "ops": "trainer.bench.ops:bench_ops",
    "sequence": "trainer.bench.sequence:bench_sequence",
    "compile": "trainer.bench.kernels:bench_compile",
    "tune": "trainer.bench.tune:bench_tune",
}
"""Functions of (config, accelerator, measured peak) that yield rows; imported when asked for."""
PRINTS_ITSELF = ("compile", "tune")


def check_suite(config: BenchConfig, accelerator: Accelerator) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: names the key, its value and what would work.
    """
    if reason := accelerator.unsupported(getattr(torch, config.dtype)):
        raise ValueError(f"dtype={config.dtype} on accelerator={accelerator.name}: {reason}")
    if unknown := sorted(set(config.operators) - OPERATORS.keys()):
        raise ValueError(f"operators={unknown}: no such operator; there are {', '.join(OPERATORS)}")
    try:
        re.compile(config.cases or "")
    except re.error as error:
        raise ValueError(f"cases={config.cases!r}: no regular expression ({error})") from error


def run_suite(config: BenchConfig, accelerator: Accelerator) -> list[dict[str, Any]]:
    """Measure `config.suite`, print its table and write its rows to `config.out`.

    Rows that were measured before a suite fails are written all the same.
    """
    torch.set_num_threads(config.num_threads)
    peak = measure_peak_flops(accelerator.device(0), getattr(torch, config.dtype), seconds=3.0)
    versions = {name: version(name) for name in ("torch", "triton", "deepspeed", "transformers")}
    versions["python"] = platform.python_version()
    context = {
        "device": accelerator.description(),
        "num_threads": torch.get_num_threads(),
        "dtype": config.dtype,
        "versions": versions,
        "measured_peak_flops": peak,
    }
    print(
        f"{context['device']}, {torch.get_num_threads()} threads, {config.dtype}, measured peak "
        f"{peak / 1e9:.0f} GFLOP/s, "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
    )
    rows: list[dict[str, Any]] = []
    try:
        for row in _suite(config, accelerator, peak):
            rows.append(asdict(row))
    finally:
        if config.out is not None:
            Path(config.out).parent.mkdir(parents=True, exist_ok=True)
            Path(config.out).write_text(json.dumps([context, *rows], indent=1))
    return rows


def _suite(config: BenchConfig, accelerator: Accelerator, peak: float) -> Iterator[Row]:
    module, _, function = SUITES[config.suite].partition(":")
    rows = getattr(importlib.import_module(module), function)(config, accelerator, peak)
    prints = config.suite not in PRINTS_ITSELF
    for index, row in enumerate(rows):
        if prints and index == 0:
            print(HEADER)
        if prints:
            print(row, flush=True)
        yield row
