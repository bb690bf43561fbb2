"""What a run leaves behind: metrics.jsonl, comm.json, profile.json, the reports, MLflow."""

import json
import logging
import os
import platform
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from conf.schema import Config
from ops.spike import spike_statistics
from parallel.comm import Comm
from parallel.ledger import Ledger
from trainer.accelerator import Accelerator
from trainer.profiler import StepProfiler
from trainer.report import write_report
from trainer.run_dir import FINISHED, config_tree, flatten
from trainer.statistics import routing_figures, spike_metrics
from trainer.tracking import MetricsFile, MLflowRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFacts:
    """What is known before the first step."""

    parameters_by_kind: dict[str, int]
    active_parameters: int
    """That one token meets."""
    measured_peak: float
    """FLOP/s of the whole world by a large matrix product of the compute dtype."""
    accelerator: Accelerator


class Recorder:
    """Writes the record on rank 0; the other ranks' calls tell it what they sent."""

    def __init__(self, config: Config, comm: Comm, facts: RunFacts, profiler: StepProfiler) -> None:
        self.config, self.facts, self.profiler = config, facts, profiler
        self.comm, self.mesh, self.ledger = comm, comm.mesh, comm.ledger
        self.run_dir = Path(str(config.run.dir))
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl")
        self.pending: list[dict[str, Any]] = []
        self.flops_by_kind: dict[str, float] = defaultdict(float)
        self.hardware_flops = 0.0
        self.histograms: dict[str, torch.Tensor] = {}
        self.val_histograms: dict[str, torch.Tensor] = {}
        self.spike_sample: dict[str, Any] | None = None
        self.loads: dict[str, torch.Tensor] = {}
        self.routing: dict[str, Counter[str]] = defaultdict(Counter)
        self.mlflow: MLflowRun | None = None

    def start(self, step: int) -> None:
        """Cut the metrics back to `step`, the position of the weights."""
        if self.mesh.rank:
            return
        self.metrics.truncate_after(step)
        if step < self.config.run.steps:
            (self.run_dir / FINISHED).unlink(missing_ok=True)
        if self.config.tracking.mlflow:
            params = flatten(config_tree(self.config))
            self.mlflow = MLflowRun(self.config.tracking, self.run_dir, params)
            self.pending = [r | {"time": time.time()} for r in self.metrics.records()]

    def log_step(self, record: dict[str, Any]) -> None:
        """Record one step, given as the trainer measured it."""
        self.ledger.steps += 1
        by_kind, hardware = record.pop("flops_by_kind"), record.pop("hardware_flops")
        model = sum(by_kind.values())
        histograms = record.pop("spike_histograms", {})
        for name, routing in record.pop("routings", {}).items():
            self.loads[name] = self.loads.get(name, 0.0) + routing.load
            self.routing[name].update(routing_figures(routing))
        seconds, peak = record["step_seconds"], self.facts.measured_peak
        data = self.config.data
        record["tokens_per_second"] = data.global_batch_size * data.seq_len / seconds
        record["mfu"], record["hfu"] = model / seconds / peak, hardware / seconds / peak
        self.hardware_flops += hardware
        for kind, flops in by_kind.items():
            self.flops_by_kind[kind] += flops
        record |= spike_metrics(histograms)
        for name, histogram in histograms.items():
            self.histograms[name] = self.histograms.get(name, 0.0) + histogram
        if self.mesh.rank == 0:
            self._append(record)

    def log_evaluation(self, record: dict[str, Any]) -> None:
        """Record one evaluation, bring profile.json and comm.json up to date; every rank calls."""
        self.val_histograms = record.pop("spike_histograms", {})
        self.spike_sample = record.pop("spike_sample", None)
        record |= spike_metrics(self.val_histograms, "val_")
        if self.mesh.rank == 0:
            self._append(record)
        self.write_profile()

    def sync(self) -> None:
        """Bring the metrics to the disk, before a checkpoint counts on them."""
        if self.mesh.rank == 0:
            self.metrics.sync()

    def flush(self) -> None:
        """Hand what is pending to MLflow."""
        if self.mlflow is not None and self.pending:
            self.mlflow.log(self.pending)
            self.pending = []

    def finish(self) -> None:
        """Write the reports and close the record of a run that is done; every rank must call."""
        self.write_profile()
        if self.mesh.rank:
            return
        report = write_report(self.run_dir)
        (self.run_dir / FINISHED).touch()
        self.flush()
        if self.mlflow is not None:
            for name in ("report.json", "report.html", "comm.json", "config.yaml"):
                self.mlflow.log_artifact(self.run_dir / name)
            self.mlflow.end("FINISHED")
        logger.info("report: %s", self.run_dir / "report.html")
        logger.debug("%s", report)

    def fail(self, interrupted: bool) -> None:
        """Close the record of a run that ends early."""
        if self.mlflow is not None:
            self.flush()
            self.mlflow.end("KILLED" if interrupted else "FAILED")

    def write_profile(self) -> None:
        """Write profile.json (what was measured, by kind of layer) and comm.json.

        Every rank must call.
        """
        if not self.ledger.steps:
            return  # a finished run, started again: what it has measured stays
        ledgers = self._gather_ledgers()
        if self.mesh.rank:
            return
        steps = self.ledger.steps
        facts, accelerator = self.facts, self.config.accelerator
        vendor = accelerator.peak_flops.get(self.config.dtype)
        parameters = facts.parameters_by_kind
        profile = {
            "device": self._device(),
            "peak": {
                "measured_flops": facts.measured_peak,
                "measured_how": "2048 x 2048 matrix product at the start, fastest of one second, "
                "times ranks",
                "vendor_flops": vendor and vendor * self.mesh.world_size,
                "vendor_source": accelerator.source,
            },
            "flops_per_step": {
                "model": sum(self.flops_by_kind.values()) / steps,
                "hardware": self.hardware_flops / steps,
            },
            "parameters": {
                "total": sum(parameters.values()),
                "active": facts.active_parameters,
                "by_kind": parameters,
            },
            "kinds": self._kinds(),
            "spikes": self._spikes(),
            "routing": self._routing(ledgers),
        }
        _write_json(self.run_dir / "profile.json", profile)
        _write_json(self.run_dir / "comm.json", ledgers[0].summary(ledgers))

    def _gather_ledgers(self) -> list[Ledger]:
        """Return the ledgers of all ranks, in order; every rank must call."""
        comm, world, device = self.comm.at(kind="record"), self.mesh.world, self.mesh.device
        text = self.ledger.dump().encode()
        sizes = comm.all_gather(torch.tensor(len(text), device=device), world).tolist()
        padded = torch.frombuffer(bytearray(text.ljust(max(sizes))), dtype=torch.uint8)
        rows = comm.all_gather(padded.to(device), world).cpu()
        return [Ledger.load(bytes(row.tolist()).decode()) for row in rows]

    def _append(self, record: dict[str, Any]) -> None:
        self.metrics.append(record)
        if self.mlflow is not None:
            self.pending.append(record | {"time": time.time()})

    def _device(self) -> dict[str, Any]:
        packages = ("torch", "deepspeed", "triton", "ray", "mlflow")
        return {
            "name": self.facts.accelerator.description(),
            "accelerator": self.config.accelerator.name,
            "dtype": self.config.dtype,
            "num_threads": torch.get_num_threads(),
            "world_size": self.mesh.world_size,
            "host_memory_bytes": psutil.virtual_memory().total,
            "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        }

    def _kinds(self) -> list[dict[str, Any]]:
        seconds = self.profiler.seconds_per_step()
        steps = max(1, self.ledger.steps)
        return [
            {
                "kind": kind,
                "seconds_per_step": seconds.get(kind, 0.0),
                "flops_per_step": self.flops_by_kind.get(kind, 0.0) / steps,
            }
            for kind in sorted(seconds.keys() | self.flops_by_kind.keys())
        ]

    def _routing(self, ledgers: list[Ledger]) -> dict[str, Any] | None:
        """Return the loads of all experts in all steps, figures of a mean step, and the bytes."""
        if not self.loads:
            return None
        steps = self.ledger.steps
        sent = [ledger.bytes_on("ep") / steps for ledger in ledgers]
        without = [(x.bytes_on("ep") + x.spared_bytes) / steps for x in ledgers]
        layers = [
            {"name": name, "layer": _layer(name), "load": load.tolist()}
            | {key: total / steps for key, total in self.routing[name].items()}
            for name, load in self.loads.items()
        ]
        return {
            "layers": layers,
            "busiest_rank_bytes_per_step": max(sent),
            "busiest_rank_bytes_per_step_without_copies": max(without),
            "mean_rank_bytes_per_step": sum(sent) / len(sent),
        }

    def _spikes(self) -> dict[str, Any] | None:
        """Return the statistics of all steps, and of the last evaluation, by input and together."""
        if not self.histograms:
            return None
        last = _spike_section(self.val_histograms) if self.val_histograms else None
        section = _spike_section(self.histograms)
        k = self.config.spike.k
        return {"k": k, **section, "validation": last, "sample": self.spike_sample}


def _spike_section(histograms: dict[str, torch.Tensor]) -> dict[str, Any]:
    layers = [
        {"name": name, "layer": _layer(name)} | spike_statistics(histogram)
        for name, histogram in histograms.items()
    ]
    whole = torch.stack(list(histograms.values())).sum(0)
    return {"layers": layers, "model": spike_statistics(whole)}


def _layer(name: str) -> int:
    """Return the number of the layer that a module of this name is in."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)
