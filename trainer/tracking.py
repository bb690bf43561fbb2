"""The record of a run: metrics.jsonl first, MLflow beside it, one log line for people."""

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from conf.schema import TrackingConfig

MLFLOW_PARAM_LIMIT = 6000


class MetricsFile:
    """metrics.jsonl: one JSON object per line, never torn, cut back to the step of a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate_after(self, step: int) -> None:
        """Drop the lines of steps after `step`, and a line that a crash has cut short."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if record["step"] <= step:
                kept.append(line)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, self.path)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record with a single write."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with open(self.path, "a") as file:
            file.write(line)

    def sync(self) -> None:
        """Wait until all lines are on the disk, as the checkpoint that follows them will be."""
        with open(self.path, "a") as file:
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """Return all records in order."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]


class MLflowRun:
    """The run in MLflow; a resumed run keeps its id and gets no step twice."""

    def __init__(self, config: TrackingConfig, run_dir: Path, params: dict[str, Any]) -> None:
        import mlflow

        run_dir = run_dir.absolute()
        self._mlflow = mlflow
        uri = config.uri or f"sqlite:///{run_dir.parent / 'mlflow.db'}"
        mlflow.set_tracking_uri(uri)
        with FileLock(run_dir.parent / ".mlflow.lock"):  # the first use makes the tables
            self.client = mlflow.MlflowClient(uri)
            experiment_id = self._experiment(config, run_dir.parent)
        id_file = run_dir / "mlflow_run_id"
        self.run_id = id_file.read_text().strip() if id_file.exists() else ""
        if not self.run_id or not self._exists():
            run = self.client.create_run(experiment_id, run_name=run_dir.name)
            self.run_id = run.info.run_id
            self._log_params(params)
            id_file.write_text(self.run_id)
        self.client.update_run(self.run_id, status="RUNNING")
        history = self.client.get_metric_history(self.run_id, "num_tokens")
        self._last_step = max((metric.step for metric in history), default=0)
        self._last_eval = max(
            (m.step for m in self.client.get_metric_history(self.run_id, "val_loss")), default=0
        )

    def log(self, records: list[dict[str, Any]]) -> None:
        """Log the numbers of metrics.jsonl records, in one batch."""
        from mlflow.entities import Metric

        metrics = []
        for record in records:
            step = record["step"]
            if step <= (self._last_eval if "val_loss" in record else self._last_step):
                continue
            metrics += [
                Metric(key, float(value), int(record["time"] * 1000), step)
                for key, value in record.items()
                if key not in ("step", "time") and isinstance(value, int | float)
            ]
        for start in range(0, len(metrics), 900):
            self.client.log_batch(self.run_id, metrics[start : start + 900])

    def log_artifact(self, path: Path) -> None:
        self.client.log_artifact(self.run_id, str(path))

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)

    def _experiment(self, config: TrackingConfig, root: Path) -> str:
        """Return the id of the experiment; a new one keeps its artifacts beside a local file."""
        experiment = self.client.get_experiment_by_name(config.experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = None if config.uri else (root / "mlflow-artifacts").as_uri()
        return str(self.client.create_experiment(config.experiment, location))

    def _exists(self) -> bool:
        try:
            self.client.get_run(self.run_id)
        except self._mlflow.exceptions.MlflowException:
            return False
        return True

    def _log_params(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        cut = [Param(key, str(value)[:MLFLOW_PARAM_LIMIT]) for key, value in params.items()]
        for start in range(0, len(cut), 100):
            self.client.log_batch(self.run_id, params=cut[start : start + 100])
