"""The record of a run: metrics.jsonl that survives a crash, and MLflow with every step once."""

import json
import time
from pathlib import Path

import mlflow
import pytest
from helpers.runs import Faults, Run, read_metrics, run, tiny

from trainer.tracking import MetricsFile


def test_metrics_file_appends_whole_lines(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.records() == []
    metrics.truncate_after(5)
    records = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None, "skipped": True}]
    for record in records:
        metrics.append(record)
    metrics.sync()
    assert metrics.records() == records
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.append({"step": 3, "loss": float("nan")})
    assert metrics.records() == records


@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', '{"step": 4, "loss": 1.0}', "{\n"])
def test_metrics_file_is_cut_back_to_a_step(tmp_path: Path, torn: str) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.append({"step": step, "loss": 1.0})
        metrics.append({"step": step, "val_loss": 1.0})
    with metrics.path.open("a") as file:
        file.write(torn)
    metrics.truncate_after(2)
    metrics.append({"step": 3, "loss": 2.0})
    assert [(r["step"], r.get("loss")) for r in metrics.records()] == [
        (1, 1.0), (1, None), (2, 1.0), (2, None), (3, 2.0),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_file_keeps_a_last_line_that_only_lacks_its_end(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}')
    metrics.truncate_after(2)
    metrics.append({"step": 3, "loss": 1.0})
    assert [record["step"] for record in metrics.records()] == [1, 2, 3]


def assert_complete(client: mlflow.MlflowClient, run_id: str, run_dir: Path) -> None:
    """Check that MLflow has every number of metrics.jsonl, each step once and in order."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = {key for record in records for key in record} - {"step"}
    assert {"loss", "grad_norm", "val_loss", "tokens_per_second", "mfu"} < keys
    for key in keys:
        expected = {record["step"]: record[key] for record in records if key in record}
        history = client.get_metric_history(run_id, key)
        assert sorted(metric.step for metric in history) == list(expected), key
        assert {metric.step: metric.value for metric in history} == pytest.approx(expected), key


@pytest.mark.slow
def test_mlflow_has_every_step_once_though_the_run_was_killed(tmp_path: Path) -> None:
    settings = ("tracking=mlflow", "tracking.experiment=tests", "checkpoint.every=2")
    arguments = tiny(tmp_path, *settings, "evaluation.every=3", "run.steps=20", "run.dir=runs/a")
    run_dir = tmp_path / "runs/a"
    started = Run(arguments, tmp_path)
    while "step 7/" not in started.log:
        assert started.process.is_alive(), started.log
        time.sleep(0.005)
    started.process.kill()
    started.wait()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    run_id = (run_dir / "mlflow_run_id").read_text()
    assert client.get_run(run_id).info.status == "RUNNING"

    run(arguments, tmp_path)
    assert (run_dir / "mlflow_run_id").read_text() == run_id
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.run_name, found.info.status) == (run_id, "a", "FINISHED")
    assert found.data.params["optim.lr"] == "0.001"
    assert found.data.params["model.mixers.linear.num_heads"] == "2"
    assert_complete(client, run_id, run_dir)
    artifacts = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert artifacts == {"report.html", "report.json", "comm.json", "config.yaml"}
    assert len(read_metrics(run_dir)) == 20 + 7


@pytest.mark.slow
def test_mlflow_says_how_a_run_ended(tmp_path: Path) -> None:
    arguments = tiny(tmp_path, "tracking=mlflow", "run.dir=runs/b", "run.max_nonfinite_steps=1")
    run(arguments, tmp_path, expect=3, faults=Faults("loss", steps=(3,)))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    run_id = (tmp_path / "runs/b/mlflow_run_id").read_text()
    assert client.get_run(run_id).info.status == "FAILED"
    assert [metric.step for metric in client.get_metric_history(run_id, "loss")] == [1, 2]
    (skipped,) = client.get_metric_history(run_id, "skipped")
    assert skipped.step == 3
