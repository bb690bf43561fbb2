"""The run directory: where it is, who holds it, and the config it was started with."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from conf.schema import Config, build

ROOT = Path("runs")
FINISHED = "finished"
"""File of a run directory whose run has taken all its steps."""
TOKENIZER = "tokenizer"
"""Folder of a run directory with the tokenizer, and what else belonged to an imported model."""
FREE_TO_CHANGE = (
    "run.dir", "run.steps", "run.resume", "run.log_every", "run.num_threads",
    "run.max_nonfinite_steps", "launcher", "parallel", "ops", "checkpoint", "evaluation",
    "tracking", "accelerator", "data.micro_batch_size", "data.cache_dir", "optim",
)  # fmt: skip
"""Keys a resumed run may set anew; the rest decides what the weights mean."""


def open_run_dir(config: Config) -> tuple[Config, Path, FileLock]:
    """Find or make the run's directory and hold it for this process.

    Returns:
        The config with `run.dir` set, the directory, and the lock (released when the process ends).

    Raises:
        ValueError: another process holds the directory, or it was started with another config.
    """
    path, lock = open_folder(config_tree(config))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(path)))
    try:
        check_begun(config, path)
    except ValueError:
        lock.release()
        raise
    save_config(config, path)
    return config, path, lock


def open_folder(tree: dict[str, Any]) -> tuple[Path, FileLock]:
    """Find or make the folder for a config, given as plain types, and hold it for this process.

    `run.dir=null` continues the newest unfinished run of the same name and config if `run.resume`
    is auto and none else holds it; otherwise it starts runs/<name>-<time>.

    Raises:
        ValueError: it cannot be made, or another process holds it.
    """
    run = tree["run"]
    if run["dir"] is None:
        candidates = _unfinished(tree) if run["resume"] == "auto" else []
        for path in candidates:
            lock = _try_lock(path)
            if lock is not None:
                return path, lock
        path = ROOT / f"{run['name']}-{time.strftime('%Y%m%d-%H%M%S')}"
        while path.exists():  # two runs begun in the same second
            path = path.with_name(path.name + "x")
    else:
        if not run["dir"]:
            raise ValueError("run.dir='' names no folder; use run.dir=null for runs/<name>-<time>")
        path = Path(run["dir"])
    return path, _hold(path)


def check_begun(config: Config, path: Path) -> None:
    """Refuse to go on with another config than the run in `path`, if any, was started with.

    Raises:
        ValueError: names the key that differs.
    """
    _check_resume(config, path)
    _check_same(config, path)


def save_config(config: Config, path: Path) -> None:
    """Write config.yaml, whole or not at all; one that says the same keeps its time."""
    save_tree(config_tree(config), path)


def save_tree(tree: dict[str, Any], path: Path) -> None:
    """Write a config, given as plain types, as `save_config` does."""
    text = "# Repeat with: longaxon train --config-dir <this folder> --config-name config "
    text += "run.dir=<new folder>\n" + yaml.safe_dump(tree, sort_keys=False)
    file, temporary = path / "config.yaml", path / ".config.yaml.tmp"
    if file.exists() and file.read_text() == text:
        return
    temporary.write_text(text)
    os.replace(temporary, file)


def read_config(path: Path) -> dict[str, Any] | None:
    """Return the config.yaml of a run directory, None where there is none."""
    file = path / "config.yaml"
    return yaml.safe_load(file.read_text()) if file.exists() else None


def config_tree(config: Config) -> dict[str, Any]:
    """Return the config as plain YAML types, extensions with their `_target_`."""
    tree: dict[str, Any] = _tree(config)
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dict as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def is_finished(path: Path) -> bool:
    """Return whether the run has taken all its steps."""
    return (path / FINISHED).exists()


def _tree(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        cls = type(value)
        target = {"_target_": f"{cls.__module__}.{cls.__qualname__}"}
        fields = {f.name: _tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return fields if cls.__module__.startswith("conf.schema.") else target | fields
    if isinstance(value, dict):
        return {key: _tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tree(item) for item in value]
    return value


def _decisive(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flatten(tree).items()
        if not any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE)
    }


def _unfinished(tree: dict[str, Any]) -> list[Path]:
    """Return this experiment's runs that can go on with this very config, newest first."""
    found = []
    for path in sorted(ROOT.glob(f"{tree['run']['name']}-*"), reverse=True):
        saved = read_config(path)
        if saved is None or is_finished(path):
            continue
        if flatten(saved | {"run": saved["run"] | {"dir": None}}) == flatten(tree):
            found.append(path)
    return found


def _has_begun(path: Path) -> bool:
    return (path / "metrics.jsonl").exists() or (path / "checkpoints").exists()


def _check_resume(config: Config, path: Path) -> None:
    resume = config.run.resume
    if resume == "never" and _has_begun(path):
        raise ValueError(
            f"run.resume=never: run.dir={path} holds a run already; use another run.dir, "
            "or run.resume=auto to continue it"
        )
    if Path(resume).absolute().is_relative_to(path.absolute() / "checkpoints"):
        raise ValueError(
            f"run.resume={resume} lies in run.dir={path} itself; use run.resume=auto to "
            "continue the run, or another run.dir to start from that checkpoint"
        )


def _check_same(config: Config, path: Path) -> None:
    saved = read_config(path)
    if saved is None or not _has_begun(path):
        return
    # Keys that are newer than the run have in it the values that stand for their absence.
    old = _decisive(config_tree(build(Config, saved)))
    new = _decisive(config_tree(config))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{key}={new.get(key)}: the run in {path} was started with {old.get(key)}; "
                "use that value, or another run.dir"
            )


def _hold(path: Path) -> FileLock:
    """Make the directory and lock it; ValueError if it cannot be written or is held already."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _try_lock(path)
    except OSError as error:
        raise ValueError(
            f"run.dir={path} must be a folder that can be written, and it cannot be "
            f"({error.strerror}: {error.filename}); use another run.dir"
        ) from error
    if lock is None:
        raise ValueError(
            f"run.dir={path}: another process is training there; wait for it, or use another "
            "run.dir"
        )
    return lock


def _try_lock(path: Path) -> FileLock | None:
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock
