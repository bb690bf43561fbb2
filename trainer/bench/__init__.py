"""`longaxon bench`: suites that measure, each next to a peer where there is one."""

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from conf.schema import BenchConfig
from trainer.accelerator import Accelerator
from trainer.bench.train_step import bench_train_step
from trainer.flops import measure_peak_flops


def run_suite(config: BenchConfig, accelerator: Accelerator) -> list[dict[str, Any]]:
    """Measure `config.suite`, print its table and write its rows to `config.out`."""
    torch.set_num_threads(config.num_threads)
    peak = measure_peak_flops(accelerator.device(0), getattr(torch, config.dtype), seconds=3.0)
    context = {
        "device": accelerator.description(),
        "num_threads": torch.get_num_threads(),
        "dtype": config.dtype,
        "versions": {p: version(p) for p in ("torch", "deepspeed", "transformers")}
        | {"python": platform.python_version()},
        "measured_peak_flops": peak,
    }
    rows = [asdict(row) for row in bench_train_step(config, accelerator, peak)]
    print(_table(context, rows))
    if config.out is not None:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_text(json.dumps([context, *rows], indent=1))
    return rows


def _table(context: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{context['device']}, {context['num_threads']} threads, {context['dtype']}, "
        f"measured peak {context['measured_peak_flops'] / 1e9:.0f} GFLOP/s, "
        + ", ".join(f"{name} {v}" for name, v in context["versions"].items()),
        f"{'case':44s} {'metric':20s} {'ours':>12s} {'peer':>12s} {'ratio':>7s}  unit (peer)",
    ]
    for row in rows:
        peer = "" if row["peer_value"] is None else f"{row['peer_value']:.4g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"{row['case']:44s} {row['metric']:20s} {row['value']:12.4g} {peer:>12s} {ratio:>7s}  "
            f"{row['unit']} ({row['peer'] or 'none'})"
        )
    return "\n".join(lines)
