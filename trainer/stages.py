"""A chain of stages as one config: each is a conversion or a run of its own, and begins with the
weights of the one before.
"""

import copy
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config, ConvertConfig, ModelConfig, StageError, build
from models.pattern import remap
from trainer.objective import read_teacher
from trainer.run_dir import check_begun, is_finished, read_config
from trainer.tracking import MetricsFile

SUMMARY = "stages.json"


@dataclass(frozen=True)
class Stage:
    """One stage of a chain; it has a config to train or one to convert.

    Attributes:
        name: its key in `stages`.
        folder: its run directory.
        config: of the run; of a conversion, of a run that would begin with what it makes.
        convert: of the conversion, None for a run.
    """

    name: str
    folder: Path
    config: Config
    convert: ConvertConfig | None

    @property
    def is_done(self) -> bool:
        """Whether it need not run again."""
        return self.has_begun if self.convert is not None else is_finished(self.folder)

    @property
    def has_begun(self) -> bool:
        """Whether its folder holds a run."""
        return (self.folder / "checkpoints").exists()


def plan_stages(tree: dict[str, Any], run_dir: Path) -> list[Stage]:
    """Return the stages in order.

    A stage of `tree["stages"]` is a part of a config that is laid over the rest of the tree, or
    `convert`, the config of a conversion but for `out`; it makes the tree's model unless it has a
    `pattern`. Where
    a stage names a run, it may name a stage before it. Without `run.init_from`, or
    `convert.source`, of its own it begins with the one just before it, and the first one with the
    chain's `run.init_from`. A stage that is null is left out.

    Raises:
        StageError: a stage's config is wrong.
    """
    base = {key: value for key, value in tree.items() if key != "stages"}
    stages: list[Stage] = []
    named = {name: stage for name, stage in tree["stages"].items() if stage is not None}
    for number, (name, overrides) in enumerate(named.items(), start=1):
        folder = run_dir / f"{number:02d}-{name}"
        try:
            stage = _plan(base, str(name), overrides, folder, stages)
        except ValueError as error:
            raise StageError(str(name), error) from error
        stages.append(stage)
    return stages


def check_unchanged(stage: Stage) -> None:
    """Refuse another config than a stage that has begun was run with.

    Raises:
        ValueError: names the key that differs.
    """
    saved = read_config(stage.folder)
    if saved is None or stage.convert is not None:
        return
    check_begun(stage.config, stage.folder)
    steps = stage.config.run.steps
    if stage.is_done and saved["run"]["steps"] != steps:
        raise ValueError(
            f"run.steps={steps}: the stage is done, with {saved['run']['steps']}; use that value, "
            "or another run.dir"
        )


def planned_models(stages: list[Stage]) -> dict[str, ModelConfig]:
    """Return the model that each stage will have left, by its folder."""
    return {str(stage.folder): stage.config.model for stage in stages}


def write_summary(stages: list[Stage], run_dir: Path) -> list[dict[str, Any]]:
    """Write stages.json, one row for each stage that is done, and return its rows."""
    rows = [_summarize(stage) for stage in stages if stage.is_done]
    temporary = run_dir / f".{SUMMARY}.tmp"
    temporary.write_text(json.dumps(rows, indent=1))
    os.replace(temporary, run_dir / SUMMARY)
    return rows


def format_summary(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table for people."""
    head = ("stage", "does", "length", "steps", "tokens", "loss", "val loss", "seconds")
    lines = [head]
    for row in rows:
        figures = (row["seq_len"], row["steps"], row["num_tokens"])
        losses = (row["loss"], row["val_loss"])
        lines.append(
            (
                row["folder"],
                row["does"],
                *("-" if x is None else f"{x:,}" for x in figures),
                *("-" if x is None else f"{x:.4f}" for x in losses),
                "-" if row["seconds"] is None else f"{row['seconds']:,.0f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _plan(
    base: dict[str, Any],
    name: str,
    overrides: dict[str, Any],
    folder: Path,
    before: list[Stage],
) -> Stage:
    if not isinstance(overrides, dict):
        raise ValueError(f"stages.{name}={overrides!r} must map sections to values, or be null")
    changes = copy.deepcopy(overrides)
    convert = changes.pop("convert", None)
    tree = _merge(base, changes)
    run = tree["run"] | {"dir": str(folder), "name": f"{base['run']['name']}-{name}"}
    folders = {stage.name: str(stage.folder) for stage in before}
    last = str(before[-1].folder) if before else run.get("init_from")
    if "init_from" not in changes.get("run", {}):
        run["init_from"] = last
    tree["run"] = run
    for section, key in (("run", "init_from"), ("objective", "teacher")):
        if section in tree:
            value = tree[section].get(key)
            tree[section][key] = folders.get(value, value)
    config = build(Config, tree)
    if convert is None:
        return Stage(name, folder, config, None)
    source = convert.get("source", last)
    own = {**convert, "out": str(folder), "source": folders.get(source, source)}
    if "pattern" not in own:
        own["model"] = tree["model"]
    conversion = build(ConvertConfig, own)
    if conversion.model is None:
        made = {str(stage.folder): stage.config.model for stage in before}
        model = made.get(conversion.source) or read_teacher(conversion.source)[0]
        config = dataclasses.replace(config, model=remap(model, conversion.pattern))
    return Stage(name, folder, config, conversion)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `changes`; mappings are merged, all else is replaced."""
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            merged[key] = _merge(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _summarize(stage: Stage) -> dict[str, Any]:
    row: dict[str, Any] = {
        "folder": stage.folder.name,
        "does": "convert" if stage.convert is not None else stage.config.objective.kind,
        "seq_len": None,
        "steps": None,
        "num_tokens": None,
        "loss": None,
        "val_loss": None,
        "seconds": None,
    }
    if stage.convert is not None:
        return row
    records = MetricsFile(stage.folder / "metrics.jsonl").records()
    steps = [record for record in records if "step_seconds" in record]
    losses = [record["loss"] for record in steps if record["loss"] is not None]
    evaluations = [record["val_loss"] for record in records if "val_loss" in record]
    return row | {
        "seq_len": stage.config.data.seq_len,
        "steps": len(steps),
        "num_tokens": steps[-1]["num_tokens"] if steps else 0,
        "loss": losses[-1] if losses else None,
        "val_loss": evaluations[-1] if evaluations else None,
        "seconds": sum(record["step_seconds"] for record in steps),
    }
