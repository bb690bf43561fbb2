"""MFU report: what a run cost and what it reached, in numbers and for a person (spec.md 2 and 5).

`write_report` is a pure function of the files in a run directory, finished or not. A section whose
numbers are not there yet is null in report.json and says so in report.html.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from trainer import figure, plots
from trainer.communication import communication_table

MFU_DEFINITION = (
    "MFU is model FLOPs / (median step time x peak FLOP/s of all devices of the run), where model "
    "FLOPs are 2 x active parameters per token for projections, FFN, router, gate and head, "
    "4 H D for every visible pair of tokens in causal softmax attention (a window counts only the "
    "pairs it sees, documents are apart) and 2 D_k D_v (H_state + H) per token in linear "
    "attention, times 3 for training; HFU adds recomputation, the passes of a teacher and what "
    "chunked kernels spend beyond the model; padding counts nowhere."
)

PUBLISHED_SPIKES: dict[str, Any] = {
    "source": "arXiv:2509.05276, 7B model, bidirectional bitwise coding",
    "k": 3.0,
    "share_silent": 0.184,
    "mean_spikes": 1.13,
    "sparsity_3_steps": 0.6915,
    "share_within_7": 0.941,
    "share_above_16": 0.01,
    "trade_off": [
        {"k": 2.0, "sparsity_3_steps": 0.730, "share_within_7": 0.989},
        {"k": 2.5, "sparsity_3_steps": 0.709, "share_within_7": 0.976},
        {"k": 3.0, "sparsity_3_steps": 0.692, "share_within_7": 0.951},
        {"k": 3.5, "sparsity_3_steps": 0.677, "share_within_7": 0.916},
        {"k": 4.0, "sparsity_3_steps": 0.664, "share_within_7": 0.877},
    ],
}
"""Published statistics; it is not said which reading of sparsity at three time steps they are."""

ROUTING = ("router_max_load", "router_entropy", "balance_loss", "router_drop_rate")
"""Keys of metrics.jsonl that are drawn over the steps."""

_CHECK_KEYS = ("share_within_7", "share_silent", "mean_spikes", "sparsity_all", "sparsity_within_7")
SIMULATED_SPIKES = [
    {"inputs": inputs, "k": k} | dict(zip(_CHECK_KEYS, values, strict=True))
    for inputs, k, values in (
        ("standard normal", 3.0, (0.954, 0.106, 1.299, 0.567, 0.572)),
        ("standard normal", 2.0, (0.997, 0.158, 1.075, 0.642, 0.642)),
        ("Laplace", 3.0, (0.918, 0.153, 1.224, 0.592, 0.614)),
        ("Laplace", 2.0, (0.977, 0.221, 1.007, 0.664, 0.670)),
    )
]
"""Statistics of drawn inputs (rows of 1,000 channels, 4 million draws), to check a measurement."""


@dataclass(frozen=True)
class RunFiles:
    """What a run directory holds; `comm` and `profile` are None until the trainer wrote them."""

    config: dict[str, Any]
    started: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    comm: dict[str, Any] | None
    profile: dict[str, Any] | None

    def values(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps that were not skipped and have a number under `key`, and the numbers."""
        found = [step for step in self.steps if step.get(key) is not None and not _skipped(step)]
        return [step["step"] for step in found], [step[key] for step in found]


def write_report(run_dir: Path) -> dict[str, Any]:
    """Write report.json and report.html from the files of a run directory; return the former.

    Raises:
        ValueError: `run_dir` is no run directory, or one of its files cannot be read.
    """
    files = _read_run(run_dir)
    report = _build_report(files, run_dir.resolve().name)
    page = _render_page(report, files)
    _write(run_dir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    _write(run_dir / "report.html", page)
    return report


def _read_run(run_dir: Path) -> RunFiles:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{run_dir} is no run directory: it has no config.yaml; name the folder that a run "
            "wrote to (run.dir of its configuration)"
        )
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("run"), dict):
        raise ValueError(f"{path} has no section `run`; restore the configuration the run saved")
    steps, evaluations = _read_metrics(run_dir / "metrics.jsonl")
    started = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return RunFiles(
        config=config,
        started=started.isoformat(timespec="seconds"),
        steps=steps,
        evaluations=evaluations,
        comm=_read_json(run_dir / "comm.json"),
        profile=_read_json(run_dir / "profile.json"),
    )


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return steps and evaluations in order; a step run again after a restart counts once, as last.

    A last line without its end is being written, or was cut off by a crash, and is left out.
    """
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip() or not line.endswith("\n"):
            continue
        record = _parse(line, f"{path}, line {number}")
        if "step" not in record:
            raise ValueError(f"{path}, line {number} has no step; remove the line")
        target = evaluations if "val_loss" in record else steps
        target[record["step"]] = record
    return [steps[key] for key in sorted(steps)], [evaluations[key] for key in sorted(evaluations)]


def _read_json(path: Path) -> dict[str, Any] | None:
    return _parse(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None


def _parse(text: str, where: str) -> dict[str, Any]:
    """Parse one JSON object; NaN and infinities, which JSON does not have, become None."""
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no valid JSON: {error}; remove or restore it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds no JSON object; remove or restore it")
    return value


def _build_report(files: RunFiles, folder: str) -> dict[str, Any]:
    profile = files.profile or {}
    steady = _steady_steps(files)
    throughput = _throughput(files, steady)
    return {
        "run": _run_section(files, folder),
        "model": profile.get("parameters"),
        "device": profile.get("device"),
        "peak": profile.get("peak"),
        "throughput": throughput,
        "memory": {"peak_bytes": max(files.values("peak_memory_bytes")[1], default=None)},
        "loss": _loss_section(files),
        "time_by_kind": _time_by_kind(profile) if profile else None,
        "communication": files.comm,
        "communication_table": communication_table(files.comm, throughput["step_seconds"]),
        "spikes": _spike_section(profile),
        "routing": profile.get("routing"),
        "skipped_steps": [
            {"step": step["step"], "reason": step.get("reason")}
            for step in files.steps
            if _skipped(step)
        ],
    }


def _run_section(files: RunFiles, folder: str) -> dict[str, Any]:
    section = files.config["run"]
    planned = section.get("steps")
    # A run that continues the checkpoint of another one has fewer lines than steps.
    done = max([len(files.steps), *(step["step"] for step in files.steps)])
    num_tokens = files.steps[-1].get("num_tokens") if files.steps else None
    return {
        "name": section.get("name") or folder,
        "steps_done": done,
        "steps_planned": planned,
        "finished": planned is not None and done >= planned,
        "started": files.started,
        "seconds_in_steps": sum(step.get("step_seconds") or 0.0 for step in files.steps),
        "num_tokens": num_tokens,
    }


def _steady_steps(files: RunFiles) -> list[dict[str, Any]]:
    """Return the steps after the warm-up: the first tenth, two at least, and no skipped ones."""
    warmup = max(2, math.ceil(len(files.steps) / 10))
    return [step for step in files.steps[warmup:] if not _skipped(step)]


def _throughput(files: RunFiles, steady: Sequence[dict[str, Any]]) -> dict[str, Any]:
    profile = files.profile or {}
    peak = profile.get("peak", {})
    flops = profile.get("flops_per_step", {})
    seconds = [step["step_seconds"] for step in steady if step.get("step_seconds")]
    rates = [step["tokens_per_second"] for step in steady if step.get("tokens_per_second")]
    median = _quantile(seconds, 0.5)

    def utilization(kind: str, peak_kind: str) -> float | None:
        return _ratio(_ratio(flops.get(kind), median), peak.get(peak_kind))

    return {
        "tokens_per_second": _quantile(rates, 0.5),
        "step_seconds": median,
        "step_seconds_p10": _quantile(seconds, 0.1),
        "step_seconds_p90": _quantile(seconds, 0.9),
        "num_steps_measured": len(seconds),
        "first_step_measured": steady[0]["step"] if steady else None,
        "model_flops_per_step": flops.get("model"),
        "hardware_flops_per_step": flops.get("hardware"),
        "model_flops_per_second": _ratio(flops.get("model"), median),
        "mfu_measured_peak": utilization("model", "measured_flops"),
        "hfu_measured_peak": utilization("hardware", "measured_flops"),
        "mfu_vendor_peak": utilization("model", "vendor_flops"),
        "definition": MFU_DEFINITION,
    }


def _loss_section(files: RunFiles) -> dict[str, Any]:
    """Losses in nats per token."""
    train = files.values("loss")[1]
    evaluations = [record for record in files.evaluations if record["val_loss"] is not None]
    best = min(evaluations, key=lambda record: record["val_loss"], default={})
    last = evaluations[-1] if evaluations else {}
    return {
        "first": train[0] if train else None,
        "last": train[-1] if train else None,
        "last_val": last.get("val_loss"),
        "last_val_bits_per_byte": last.get("val_bits_per_byte"),
        "best_val": best.get("val_loss"),
        "best_val_bits_per_byte": best.get("val_bits_per_byte"),
        "best_val_step": best.get("step"),
    }


def _time_by_kind(profile: dict[str, Any]) -> list[dict[str, Any]]:
    """Return seconds, shares and MFU of every kind of work, the longest first."""
    kinds = profile["kinds"]
    all_seconds = sum(kind["seconds_per_step"] for kind in kinds)
    all_flops = sum(kind["flops_per_step"] for kind in kinds)
    peak = profile["peak"]["measured_flops"]
    rows = []
    for kind in sorted(kinds, key=lambda kind: -kind["seconds_per_step"]):
        seconds, flops = kind["seconds_per_step"], kind["flops_per_step"]
        row = {
            "time_share": _ratio(seconds, all_seconds),
            "flops_share": _ratio(flops, all_flops),
            "mfu": _ratio(_ratio(flops or None, seconds), peak),
        }
        rows.append(kind | row)
    return rows


def _spike_section(profile: dict[str, Any]) -> dict[str, Any] | None:
    spikes = profile.get("spikes")
    if spikes is None:
        return None
    return spikes | {"reference": PUBLISHED_SPIKES, "check": SIMULATED_SPIKES}


def _skipped(step: dict[str, Any]) -> bool:
    return bool(step.get("skipped"))


def _quantile(values: Sequence[float], q: float) -> float | None:
    return float(np.quantile(values, q)) if values else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _render_page(report: dict[str, Any], files: RunFiles) -> str:
    """Fill the template beside this file; everything but our own figures is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "si": _si, "size": _size, "percent": _percent, "num": _number, "ms": _milliseconds
    }  # fmt: skip
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        report=report,
        figures={name: Markup(svg) for name, svg in _draw(report, files).items()},
        config=files.config,
        config_text=yaml.safe_dump(files.config, sort_keys=False, allow_unicode=True),
        light=figure.LIGHT,
        dark=figure.DARK,
    )


def _draw(report: dict[str, Any], files: RunFiles) -> dict[str, str]:
    """Draw every figure that has numbers."""
    loss, rate = files.values("loss"), files.values("tokens_per_second")
    figures = {}
    if loss[0]:
        val = [record for record in files.evaluations if record["val_loss"] is not None]
        val_curve = [record["step"] for record in val], [record["val_loss"] for record in val]
        skipped = [row["step"] for row in report["skipped_steps"]]
        figures["loss"] = plots.loss_curve(loss, val_curve, skipped)
        figures["optimizer"] = plots.optimizer_curves(files.values("lr"), files.values("grad_norm"))
    if rate[0]:
        throughput = report["throughput"]
        first = throughput["first_step_measured"]
        figures["throughput"] = plots.throughput_curve(
            rate, rate[0][-1] if first is None else first, throughput["tokens_per_second"]
        )
    if report["time_by_kind"]:
        figures["time"] = plots.time_bars(report["time_by_kind"])
    if report["spikes"]:
        figures["spikes"] = plots.spikes_by_layer(report["spikes"]["layers"], PUBLISHED_SPIKES)
        figures["trade_off"] = plots.spike_trade_off(report["spikes"])
        if sample := report["spikes"].get("sample"):
            title = f"{sample['name']}, k = {sample['k']:g}, one token"
            figures["raster"] = plots.spike_raster(sample["counts"], title)
        figures["counts"] = plots.count_histogram(report["spikes"]["model"]["histogram"])
    if report["routing"]:
        figures["loads"] = plots.expert_loads(report["routing"]["layers"])
        figures["routing"] = plots.routing_curves({name: files.values(name) for name in ROUTING})
    return figures


NONE = "\N{EN DASH}"
"""Stands in the page for a number that there is not."""


def _number(value: float | None, digits: int = 4) -> str:
    """Format an integer in full and any other number with that many significant digits."""
    if value is None:
        return NONE
    return f"{value:,d}" if isinstance(value, int) else f"{value:#,.{digits}g}".rstrip(".")


def _si(value: float | None, unit: str = "") -> str:
    """Format three digits with a decimal prefix: 1234.5 tokens/s is 1.23 k tokens/s."""
    return _scaled(value, unit, 1000, ("", "k", "M", "G", "T", "P", "E"))


def _size(value: float | None) -> str:
    """Format bytes with a binary prefix: 1536 is 1.50 KiB."""
    return _scaled(value, "B", 1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi"))


def _scaled(value: float | None, unit: str, base: int, prefixes: Sequence[str]) -> str:
    if value is None:
        return NONE
    power = 0
    # 999.5 would be printed with four digits; it belongs to the next prefix.
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    digits = 0 if abs(value) >= 99.95 or value == int(value) else 1 if abs(value) >= 9.995 else 2
    # SI attaches the prefix to a unit symbol; before a word it stands alone.
    gap = " " if prefixes[power] and unit[:1].islower() else ""
    return f"{value:,.{digits}f} {prefixes[power]}{gap}{unit}".rstrip()


def _percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def _milliseconds(seconds: float | None) -> str:
    return NONE if seconds is None else f"{1000 * seconds:,.3g} ms"


def _write(path: Path, text: str) -> None:
    """Put the whole file in place at once, so that a reader sees the old one or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
