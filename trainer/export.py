"""A checkpoint's weights as safetensors files: in a layout that others read, or in our own."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from conf.schema import Config, ExportConfig
from models.io import ExportPlan, plan_export
from models.io.read import read_json
from models.io.tokenizer_files import FILES
from trainer.checkpoint import fsync, save_tensors, writing
from trainer.checkpoint_adapters import MergedTensors, load_merged
from trainer.data import load_tokenizer
from trainer.restore import find_run
from trainer.run_dir import TOKENIZER

logger = logging.getLogger(__name__)

_PREFIX = "model/"


def export_run(config: ExportConfig, *, max_shard_bytes: int = 5 * 10**9) -> Path:
    """Write the folder that `config` asks for and return it.

    In another's layout it holds config.json and the tokenizer as well.

    Raises:
        ValueError: no sound checkpoint, `out` is not empty, or the format cannot express the model.
        CheckpointWriteError: a file could not be written; nothing is left of it.
    """
    out = Path(config.out)
    _require_empty(out)
    run, checkpoint = find_run(config.run)
    if run.quantization is not None:
        raise ValueError(
            f"run={config.run} is in INT8, whose safetensors files lie in {checkpoint}; export the "
            "run that it was made from"
        )
    folder = _tokenizer_folder(run, checkpoint.parent.parent)
    source = _read_source(folder)
    # What was only imported was trained on sequences as long as its config.json says.
    is_as_imported = "model_type" in source and checkpoint.name == "step_00000000"
    plan = plan_export(
        run.model,
        config.format,
        is_spiking=run.spike.enabled,
        seq_len=0 if is_as_imported else run.data.seq_len,
        source=source,
    )
    logger.info("format %s%s", plan.format, "".join(f"; {why}" for why in plan.reasons))
    if plan.values is None:
        names, files = None, dict[str, bytes]()
    else:
        names = {f"{_PREFIX}{ours}": theirs for ours, theirs in plan.names.items()}
        _require_same_names(load_merged(checkpoint), names, plan)
        files = _tokenizer_files(folder)
        files["config.json"] = _encode(_with_dtype(plan.values, config.dtype))
    if run.spike.enabled and plan.values is not None:
        logger.warning("config.json does not say that the model spikes, with k=%g", run.spike.k)
    dtype = getattr(torch, config.dtype)
    return export_safetensors(
        checkpoint, out, dtype, names=names, files=files, max_shard_bytes=max_shard_bytes
    )


def export_safetensors(
    checkpoint: Path,
    out_folder: Path,
    dtype: torch.dtype,
    *,
    names: Mapping[str, str] | None = None,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write the weights alone, cast to float32 or bfloat16, under Hugging Face's file names.

    `out_folder` must be absent or empty and appears when all is written. Above `max_shard_bytes`
    the weights are split between tensors into several files with an index.

    Args:
        names: of the tensors to write by those in the checkpoint, in this order; None: all of the
            model's, as they are.
        files: contents of further files by name.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype={dtype} cannot be exported; use torch.float32 or torch.bfloat16")
    _require_empty(out_folder)
    tensors, files = load_merged(checkpoint), files or {}
    if names is None:
        names = {n: n.removeprefix(_PREFIX) for n in tensors if n.startswith(_PREFIX)}
    sizes = {name: tensors.shapes[name].numel() * dtype.itemsize for name in names}
    groups, total_size = _pack(sizes, max_shard_bytes), sum(sizes.values())
    num_bytes = total_size + sum(map(len, files.values()))
    working = out_folder.absolute().with_name(f".{out_folder.absolute().name}.tmp")
    with writing(out_folder, num_bytes, working, f"the checkpoint {checkpoint} is intact"):
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups, start=1):
            suffix = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            path = working / f"model{suffix}.safetensors"
            save_tensors(path, {names[name]: tensors.get(name).to(dtype) for name in group})
            weight_map |= dict.fromkeys((names[name] for name in group), path.name)
        if len(groups) > 1:
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            (working / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for name, content in files.items():
            (working / name).write_bytes(content)
        for path in (*working.iterdir(), working):
            fsync(path)
        working.replace(out_folder)
        fsync(working.parent)
    return out_folder


def _pack(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Return the names in groups of at most `max_bytes`, or of one tensor."""
    groups: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= size
    return groups


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; name a folder that is absent or empty")


def _require_same_names(tensors: MergedTensors, names: Mapping[str, str], plan: ExportPlan) -> None:
    """Raise ValueError if the checkpoint holds other weights than those that have a name."""
    found = {name for name in tensors if name.startswith(_PREFIX)}
    if odd := sorted(name.removeprefix(_PREFIX) for name in found ^ names.keys()):
        raise ValueError(
            f"format={plan.format} has no place for, or the checkpoint lacks, {', '.join(odd)}; "
            "format=longaxon writes what is there"
        )


def _tokenizer_folder(run: Config, run_dir: Path) -> Path | None:
    """Return the folder of the run's own tokenizer, else of the one its data names."""
    if (run_dir / TOKENIZER).is_dir():
        return run_dir / TOKENIZER
    named = Path(run.data.tokenizer).expanduser()
    folder = named if named.is_dir() else named.parent
    return folder if (folder / "tokenizer.json").is_file() else None


def _read_source(folder: Path | None) -> dict[str, Any]:
    """Return the config.json beside the tokenizer, or the id alone that ends a document."""
    if folder is None:
        return {}
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json")
    return {"eos_token_id": load_tokenizer(str(folder)).eos_id}


def _tokenizer_files(folder: Path | None) -> dict[str, bytes]:
    if folder is None:
        return {}
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def _with_dtype(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    return values | {"dtype" if "dtype" in values else "torch_dtype": dtype}


def _encode(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
