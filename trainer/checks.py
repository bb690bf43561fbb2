"""Checks across sections of a config, all made before any process or device is touched."""

import math
from pathlib import Path

import torch

from conf.schema import Config
from ops.catalog import OPERATORS
from ops.registry import explain
from trainer.accelerator import Accelerator
from trainer.checkpoint import resolve, verify
from trainer.data import check_data, load_tokenizer


def check_config(config: Config, accelerator: Accelerator, world_size: int) -> None:
    """Refuse what cannot run on `world_size` ranks of `accelerator`.

    Raises:
        ValueError: names the key, its value, what is required and a value that would work.
    """
    _check_parallel(config, world_size)
    _check_batch(config, world_size)
    _check_model(config)
    _check_optim(config)
    _check_device(config, accelerator)
    _check_resume(config)
    check_data(config.data)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is below the {tokenizer.vocab_size} "
            f"tokens of data.tokenizer={config.data.tokenizer}; use "
            f"model.vocab_size={math.ceil(tokenizer.vocab_size / 8) * 8}"
        )


def _check_parallel(config: Config, world_size: int) -> None:
    parallel, launcher = config.parallel, config.launcher
    if launcher.name == "inline" and launcher.num_workers != 1:
        raise ValueError(
            f"launcher.num_workers={launcher.num_workers}: launcher=inline runs one rank; use "
            "launcher=ray"
        )
    for axis in ("pp", "ep"):
        if getattr(parallel, axis) != 1:
            raise ValueError(
                f"parallel.{axis}={getattr(parallel, axis)}: this version spreads work over the "
                f"data and sequence axes only; use parallel.{axis}=1"
            )
    sp_size = parallel.ulysses * parallel.ring
    if world_size % sp_size:
        raise ValueError(
            f"parallel.ulysses={parallel.ulysses} x parallel.ring={parallel.ring} must divide the "
            f"{world_size} ranks that launcher={launcher.name} gives"
        )
    if parallel.dp is not None and parallel.dp * sp_size != world_size:
        raise ValueError(
            f"parallel.dp={parallel.dp} x {sp_size} sequence ranks must equal the {world_size} "
            f"ranks that launcher={launcher.name} gives; use parallel.dp={world_size // sp_size} "
            "or null"
        )
    needed = {"none": 0, "optimizer": 1, "all": 3}[parallel.offload]
    if parallel.zero_stage < needed:
        raise ValueError(
            f"parallel.offload={parallel.offload} needs parallel.zero_stage of {needed} at least, "
            f"not {parallel.zero_stage}; use parallel.zero_stage={needed} or parallel.offload=none"
        )


def _check_batch(config: Config, world_size: int) -> None:
    data = config.data
    sp_size = config.parallel.ulysses * config.parallel.ring
    dp_size = world_size // sp_size
    unit = data.micro_batch_size * dp_size
    if data.global_batch_size % unit:
        near = [n for n in (data.global_batch_size // unit * unit, 0) if n] + [
            (data.global_batch_size // unit + 1) * unit
        ]
        raise ValueError(
            f"data.global_batch_size={data.global_batch_size} must be a multiple of "
            f"data.micro_batch_size={data.micro_batch_size} x {dp_size} data ranks; use "
            f"data.global_batch_size={' or '.join(map(str, near))}"
        )


def _check_model(config: Config) -> None:
    model = config.model
    for i, layer in enumerate(model.layers):
        for name in layer.mixers:
            if name not in model.mixers:
                raise ValueError(
                    f"model.layers[{i}].mixers names {name!r}, which model.mixers does not define; "
                    f"it defines {', '.join(model.mixers) or 'none'}"
                )
        if len(set(layer.mixers)) != len(layer.mixers):
            raise ValueError(f"model.layers[{i}].mixers={layer.mixers} names a mixer twice")
        if layer.ffn not in model.ffns:
            raise ValueError(
                f"model.layers[{i}].ffn={layer.ffn!r} is not in model.ffns; use one of "
                f"{', '.join(model.ffns) or 'none'}"
            )


def _check_optim(config: Config) -> None:
    optim, steps = config.optim, config.run.steps
    if optim.warmup_steps > steps:
        raise ValueError(
            f"optim.warmup_steps={optim.warmup_steps} exceeds run.steps={steps}; use "
            f"optim.warmup_steps={steps // 10}"
        )
    if optim.schedule == "wsd" and not 1 <= optim.decay_steps <= steps - optim.warmup_steps:
        raise ValueError(
            f"optim.decay_steps={optim.decay_steps}: optim.schedule=wsd needs 1 to "
            f"{steps - optim.warmup_steps} of the {steps} steps after the warm-up; use "
            f"optim.decay_steps={max(1, steps // 5)}"
        )


def _check_device(config: Config, accelerator: Accelerator) -> None:
    dtype = getattr(torch, config.dtype)
    reason = accelerator.unsupported(dtype)
    if reason:
        raise ValueError(f"dtype={config.dtype} on accelerator={accelerator.name}: {reason}")
    for op, table in OPERATORS.items():
        explain(op, table, accelerator.name, dtype, getattr(config.ops, op))


def _check_resume(config: Config) -> None:
    if config.run.resume not in ("auto", "never"):
        path = resolve(Path(config.run.resume))
        verify(path)
