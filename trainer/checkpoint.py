"""On-disk store of checkpoints: one folder per checkpoint, complete or absent.

A save fills a hidden working folder, writes `manifest.json` (size and SHA-256 of every file) last
and becomes visible by one rename. Nothing here communicates: the caller runs `begin` and `commit`
on rank 0, puts a barrier after the one and before the other, and hands over each rank's tensors.
`latest`, `resolve` and `verify` read every byte: for one rank, which tells the others the path.
Only safetensors and JSON are read, so that no file can run code.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trainer.checkpoint_tensors import CheckpointDamaged, CheckpointTensors

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_STATE = "state.json"
_SHARD = "shard_{:05d}.safetensors"
_FOLDER = re.compile(r"\.?step_(\d{8,})(\.replaced)?")


class CheckpointWriteError(RuntimeError):
    """A file could not be written; the unfinished checkpoint is removed, earlier ones intact."""


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run, of which the last `keep` are kept; one save at a time."""

    folder: Path
    keep: int

    def begin(self, step: int) -> Path:
        """Make an empty working folder and remove what cut-short saves have left (rank 0)."""
        working = self._path(step, "tmp")
        with writing(working, 0, working, self._intact()):
            self._remove_leftovers()
            working.mkdir(parents=True)
        return working

    def write_shard(self, step: int, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write the tensors of rank `index`, whose names no other rank may hold."""
        working = self._path(step, "tmp")
        path = working / _SHARD.format(index)
        with writing(path, sum(t.nbytes for t in tensors.values()), working, self._intact()):
            if not working.is_dir():
                raise FileNotFoundError("rank 0's folder is not visible, or another rank failed")
            save_tensors(path, tensors)
            entry = _flush(path)
        self._write_json(path.with_suffix(".json"), entry)

    def commit(self, step: int, state: dict[str, Any], num_shards: int | None = None) -> Path:
        """Complete the checkpoint once all shards are written, and remove old ones (rank 0).

        `num_shards` is the number of ranks that write; None: as many as are found. A missing shard,
        or a name in two of them, raises ValueError. Checkpoints of later steps, there when a run
        was resumed from further back, are neither counted nor removed.
        """
        working, final = self._path(step, "tmp"), self._path(step)
        reports = sorted(working.glob("shard_*.json"))
        if num_shards not in (None, len(reports)) or not reports:
            raise ValueError(
                f"{working}: {len(reports)} shards found, {num_shards or 'at least 1'} expected; "
                "every rank must write its own before commit, to a file system that all share"
            )
        files = {path.with_suffix(".safetensors").name: _load_json(path) for path in reports}
        files[_STATE] = self._write_json(working / _STATE, state)
        manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
        self._write_json(working / _MANIFEST, manifest)
        load_tensors(working)  # Raises if a shard is missing or holds a tensor of another one.
        with writing(final, 0, working, self._intact()):
            for path in reports:
                path.unlink()
            fsync(working)
            if final.exists():
                final.rename(self._path(step, "replaced"))
            working.rename(final)
            fsync(self.folder)
        self._remove_leftovers()
        kept = [old for old in self.steps() if old <= step][-self.keep :]
        for old, path in self._folders().items():
            if old < step and old not in kept:
                _discard(path.rename(self._path(old, "removed")))
        return final

    def abandon(self, step: int) -> None:
        """Remove a working folder in which no rank writes any longer (rank 0)."""
        shutil.rmtree(self._path(step, "tmp"), ignore_errors=True)

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that look complete, oldest first."""
        return sorted(s for s, path in self._folders().items() if (path / _MANIFEST).is_file())

    def latest(self) -> Path | None:
        """Return the newest sound checkpoint, None without any, ValueError if all are damaged."""
        folders = self._folders()
        for step in sorted(folders, reverse=True):
            try:
                verify(folders[step])
                return folders[step]
            except CheckpointDamaged as error:
                logger.warning("checkpoint is damaged, trying the one before: %s", error)
        if folders:
            raise ValueError(
                f"no checkpoint of steps {sorted(folders)} in {self.folder} is sound (see the "
                "warnings); restore one, or set run.resume to another one or to never"
            )
        return None

    def _path(self, step: int, kind: str = "") -> Path:
        return self.folder / (f".step_{step:08d}.{kind}" if kind else f"step_{step:08d}")

    def _folders(self) -> dict[int, Path]:
        """Return the folders by step; one put aside counts until its replacement is in place."""
        paths = [*self.folder.glob(".step_*.replaced"), *self.folder.glob("step_*[0-9]")]
        return {int(m[1]): p for p in paths if (m := _FOLDER.fullmatch(p.name)) and p.is_dir()}

    def _write_json(self, path: Path, value: dict[str, Any]) -> dict[str, Any]:
        content = json.dumps(value, indent=1).encode()
        with writing(path, len(content), path.parent, self._intact()):
            path.write_bytes(content)
            return _flush(path)

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(".step_*"):
            final = self.folder / path.stem.removeprefix(".")
            if path.suffix == ".replaced" and not final.exists():
                path.rename(final)
            else:
                _discard(path)

    def _intact(self) -> str:
        if not (steps := self.steps()):
            return "there is no earlier checkpoint"
        return f"the earlier checkpoints are intact, the newest is {self._path(steps[-1])}"


def verify(path: Path) -> None:
    """Read the whole checkpoint; raises CheckpointDamaged naming the file and what is wrong."""
    files = _read_manifest(path)
    for name, entry in files.items():
        if (size := _require_file(path / name)) != entry.get("size"):
            raise CheckpointDamaged(f"{path / name}: {size} bytes, not {entry.get('size')}")
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(files, pool.map(_digest, map(path.joinpath, files)), strict=True):
            if digest != files[name].get("sha256"):
                raise CheckpointDamaged(f"{path / name}: checksum does not match the manifest")


def load_state(path: Path) -> dict[str, Any]:
    """Return the trainer state of a checkpoint."""
    return _load_json(path / _STATE)


def load_tensors(path: Path) -> CheckpointTensors:
    """Return the tensors of all shards of a checkpoint."""
    return CheckpointTensors(path / name for name in sorted(_read_manifest(path)) if name != _STATE)


def resolve(path_or_run: Path | str) -> Path:
    """Return the given checkpoint or the newest of the given run; ValueError if none is sound."""
    path = Path(path_or_run)
    if (path / _MANIFEST).exists() or (path.is_dir() and _FOLDER.fullmatch(path.name)):
        verify(path)
        return path
    if (latest := CheckpointStore(path / "checkpoints", keep=1).latest()) is None:
        raise ValueError(
            f"{path} holds no checkpoint; set run.resume (or run) to a checkpoint folder or to a "
            "run directory that has one, or run.resume=never"
        )
    return latest


@contextmanager
def writing(path: Path, num_bytes: int, working: Path, intact: str) -> Iterator[None]:
    """Turn a failure to write `path` into an error a user can act on, and free the space."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointDamaged) as error:
        shutil.rmtree(working, ignore_errors=True)
        existing = next(parent for parent in working.absolute().parents if parent.exists())
        raise CheckpointWriteError(
            f"{path} could not be written ({error}): it needs {num_bytes} bytes, "
            f"{shutil.disk_usage(existing).free} are free after removing {working}; {intact}"
        ) from error


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one safetensors file that whoever may read its folder may read."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # save_file leaves it to its owner alone


def _flush(path: Path) -> dict[str, Any]:
    """Hash a file just written, from memory, while it goes to the disk; return size and hash."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        flushed = pool.submit(fsync, path)
        entry = {"size": path.stat().st_size, "sha256": _digest(path)}
        flushed.result()
    return entry


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s could not be removed, the next save tries again: %s", path, error)


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    file = path / _MANIFEST
    manifest = _load_json(file)
    if (version := manifest.get("format_version")) != FORMAT_VERSION:
        raise CheckpointDamaged(f"{file}: unknown format version {version!r}")
    match, step = _FOLDER.fullmatch(path.name), manifest.get("step")
    if match and step != int(match[1]):
        raise CheckpointDamaged(f"{file}: it is of step {step!r}, the folder of step {match[1]}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise CheckpointDamaged(f"{file}: `files` does not map names to sizes and checksums")
    expected = {_STATE, *(_SHARD.format(index) for index in range(len(files) - 1))}
    if wrong := sorted(files.keys() ^ expected):
        raise CheckpointDamaged(f"{file}: file names missing or not allowed: {wrong}")
    return files


def _load_json(path: Path) -> dict[str, Any]:
    _require_file(path)
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointDamaged(f"{path}: not a JSON object")
    return value


def _require_file(path: Path) -> int:
    """Return the size of a regular file; a link could lead out of the checkpoint."""
    if path.is_symlink() or not path.is_file():
        raise CheckpointDamaged(f"{path}: {'no regular file' if path.exists() else 'missing'}")
    return path.stat().st_size


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointDamaged(f"{path}: {error}") from error
