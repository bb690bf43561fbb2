"""Checks across sections of a config, all made before any process or device is touched."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import torch

from conf.schema import Config, ParallelConfig
from models.mixers.softmax_attention import SoftmaxAttentionConfig
from ops.catalog import OPERATORS
from ops.registry import explain
from parallel.sequence.all_to_all import plan_heads
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
    _check_sequence(config, world_size)
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
    sp_size = parallel.ulysses * parallel.ring
    ranks = f"{world_size} ranks that launcher={launcher.name} gives"
    if world_size % sp_size:
        remedies = _near_worlds(config, world_size) + _near_degrees(config, world_size)
        raise ValueError(
            f"parallel.ulysses={parallel.ulysses} x parallel.ring={parallel.ring} must divide the "
            f"{ranks}; use {' or '.join(remedies)}"
        )
    if parallel.dp is not None and parallel.dp * sp_size != world_size:
        raise ValueError(
            f"parallel.dp={parallel.dp} x {sp_size} sequence ranks must equal the {ranks}; use "
            f"parallel.dp={world_size // sp_size} or null"
        )
    needed = {"none": 0, "optimizer": 1, "all": 3}[parallel.offload]
    if parallel.zero_stage < needed:
        raise ValueError(
            f"parallel.offload={parallel.offload} needs parallel.zero_stage of {needed} at least, "
            f"not {parallel.zero_stage}; use parallel.zero_stage={needed} or parallel.offload=none"
        )


def _check_sequence(config: Config, world_size: int) -> None:
    """Refuse more sequence ranks than heads or tokens can be shared among."""
    parallel, data = config.parallel, config.data
    for name, mixer in _full_attention(config).items():
        try:
            plan_heads(mixer.num_heads, mixer.num_kv_heads, parallel.ulysses)
        except ValueError as error:
            reason = str(error).partition(";")[0]
            near = " or ".join(_near_degrees(config, world_size))
            raise ValueError(f"model.mixers.{name}: {reason}; use {near}") from error
    needed = _count_segments(parallel)
    if data.seq_len * data.micro_batch_size < needed:
        remedies = [f"data.seq_len={math.ceil(needed / data.micro_batch_size)}"]
        contiguous = _replace_parallel(config, layout="contiguous")
        if _fits(contiguous, world_size):
            remedies.append("parallel.layout=contiguous")
        raise ValueError(
            f"data.seq_len={data.seq_len} x data.micro_batch_size={data.micro_batch_size} tokens "
            f"must be {needed} at least, one for each segment that parallel.ulysses="
            f"{parallel.ulysses} x parallel.ring={parallel.ring} in parallel.layout="
            f"{parallel.layout} has; use "
            + " or ".join(remedies + _near_degrees(config, world_size))
        )


def _fits(config: Config, world_size: int) -> bool:
    """Return whether the degrees of parallelism suit the ranks, the batch and the model."""
    parallel, data = config.parallel, config.data
    dp_size, rest = divmod(world_size, parallel.ulysses * parallel.ring)
    if rest or parallel.dp not in (None, dp_size):
        return False
    if data.global_batch_size % (data.micro_batch_size * dp_size):
        return False
    if data.seq_len * data.micro_batch_size < _count_segments(parallel):
        return False
    try:
        for mixer in _full_attention(config).values():
            plan_heads(mixer.num_heads, mixer.num_kv_heads, parallel.ulysses)
    except ValueError:
        return False
    return True


def _near_degrees(config: Config, world_size: int) -> list[str]:
    """Return overrides for the two nearest degrees that fit, first of all as many ranks."""
    parallel = config.parallel
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]

    def distance(choice: tuple[int, int]) -> tuple[bool, float]:
        ulysses, ring = choice[0] / parallel.ulysses, choice[1] / parallel.ring
        return ulysses * ring != 1, abs(math.log(ulysses)) + abs(math.log(ring))

    choices = [
        (ulysses, ring)
        for ulysses in divisors
        for ring in divisors
        if _fits(_replace_parallel(config, ulysses=ulysses, ring=ring), world_size)
    ]
    overrides = []
    for ulysses, ring in sorted(choices, key=distance)[:2]:
        changed = [f"parallel.ulysses={ulysses}"] if ulysses != parallel.ulysses else []
        changed += [f"parallel.ring={ring}"] if ring != parallel.ring else []
        overrides.append(" ".join(changed))
    return overrides


def _near_worlds(config: Config, world_size: int) -> list[str]:
    """Return what gives a near number of ranks that fits the degrees."""
    sp_size = config.parallel.ulysses * config.parallel.ring
    below = world_size // sp_size
    counts = (config.parallel.dp,) if config.parallel.dp else (below, below + 1)
    sizes = [n * sp_size for n in counts if n and _fits(config, n * sp_size)] or [sp_size]
    key = {
        "inline": "launcher=ray launcher.num_workers=",
        "ray": "launcher.num_workers=",
        "env": "WORLD_SIZE=",
    }[config.launcher.name]
    return [f"{key}{size}" for size in sizes]


def _count_segments(parallel: ParallelConfig) -> int:
    """Return the segments that all ranks of a sequence hold together."""
    is_zigzag = parallel.layout == "zigzag" and parallel.ring > 1
    return parallel.ulysses * parallel.ring * (2 if is_zigzag else 1)


def _full_attention(config: Config) -> dict[str, SoftmaxAttentionConfig]:
    """Return the mixers of full attention that a layer has, whose heads Ulysses shares out."""
    used = {name for layer in config.model.layers for name in layer.mixers}
    return {
        name: mixer
        for name, mixer in config.model.mixers.items()
        if name in used and isinstance(mixer, SoftmaxAttentionConfig) and mixer.window_size is None
    }


def _replace_parallel(
    config: Config,
    *,
    ulysses: int | None = None,
    ring: int | None = None,
    layout: Literal["contiguous", "zigzag"] | None = None,
) -> Config:
    given = config.parallel
    parallel = dataclasses.replace(
        given,
        ulysses=ulysses or given.ulysses,
        ring=ring or given.ring,
        layout=layout or given.layout,
    )
    return dataclasses.replace(config, parallel=parallel)


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
