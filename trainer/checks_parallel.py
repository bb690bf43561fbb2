"""Which degrees of parallelism suit the ranks, the batch and the model, and which near ones do."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from conf.schema import Config, MoEConfig, ParallelConfig
from models.causal_lm import layer_list
from models.mixers.softmax_attention import SoftmaxAttentionConfig
from parallel.sequence.all_to_all import plan_heads

Degree = Literal["pp", "ep", "ulysses", "ring"]


def check_parallel(config: Config, world_size: int) -> None:
    """Refuse what cannot be shared out over `world_size` ranks; the layers must name what exists.

    Raises:
        ValueError: names the key, its value, what is required and a value that would work.
    """
    for problem in _problems(config, world_size):
        raise ValueError(f"{problem.reason}; use {' or '.join(problem.remedies())}")


class _Problem(NamedTuple):
    reason: str
    remedies: Callable[[], list[str]]
    """Overrides that would do, of which `_fits` says that they suit everything else, too."""


def _fits(config: Config, world_size: int) -> bool:
    return next(_problems(config, world_size), None) is None


def _problems(config: Config, world_size: int) -> Iterator[_Problem]:
    """Yield what stands in the way; what comes later relies on nothing having come before."""
    yield from _ranks(config, world_size)
    yield from _zero(config, world_size)
    yield from _experts(config, world_size)
    yield from _batch(config, world_size)
    yield from _sequence(config, world_size)


def _ranks(config: Config, world_size: int) -> Iterator[_Problem]:
    parallel, launcher = config.parallel, config.launcher
    if launcher.name == "inline" and launcher.num_workers != 1:
        yield _Problem(
            f"launcher.num_workers={launcher.num_workers}: launcher=inline runs one rank",
            lambda: ["launcher=ray"],
        )
    ranks = f"{world_size} ranks that launcher={launcher.name} gives"
    size = parallel.pp * parallel.ulysses * parallel.ring
    if world_size % size:
        yield _Problem(
            f"parallel.pp={parallel.pp} x parallel.ulysses={parallel.ulysses} x parallel.ring="
            f"{parallel.ring} must divide the {ranks}",
            lambda: (
                _near_worlds(config, world_size)
                + _near_degrees(config, world_size, "ulysses", "ring")
                + _near_degrees(config, world_size, "pp")
            ),
        )
    if parallel.dp is not None and parallel.dp * size != world_size:
        yield _Problem(
            f"parallel.dp={parallel.dp} x parallel.pp={parallel.pp} x "
            f"{parallel.ulysses * parallel.ring} sequence ranks must equal the {ranks}",
            lambda: [f"parallel.dp={world_size // size}", "null"],
        )
    count = config.model.num_layers
    if parallel.pp > count:
        yield _Problem(
            f"parallel.pp={parallel.pp} exceeds model.num_layers={count}, and every stage needs "
            "a layer",
            lambda: [*_near_degrees(config, world_size, "pp"), f"model.num_layers={parallel.pp}"],
        )


def _zero(config: Config, world_size: int) -> Iterator[_Problem]:
    """What DeepSpeed's ZeRO cannot do."""
    parallel = config.parallel
    stage, offload = parallel.zero_stage, parallel.offload
    if parallel.pp > 1 and (stage > 1 or offload != "none"):
        lower = _name_changes(parallel, {"zero_stage": min(stage, 1), "offload": "none"})
        yield _Problem(
            f"parallel.pp={parallel.pp} needs parallel.zero_stage of 1 at most and "
            f"parallel.offload=none, not {stage} and {offload}",
            lambda: [lower, *_near_degrees(config, world_size, "pp")],
        )
    if parallel.ep > 1 and stage == 3:
        offload_less = "optimizer" if offload == "all" else offload
        lower = _name_changes(parallel, {"zero_stage": 2, "offload": offload_less})
        yield _Problem(
            f"parallel.ep={parallel.ep} needs parallel.zero_stage of 2 at most, not {stage}",
            lambda: [lower, "parallel.ep=1"],
        )
    needed = {"none": 0, "optimizer": 1, "all": 3}[offload]
    if stage < needed:
        yield _Problem(
            f"parallel.offload={offload} needs parallel.zero_stage of {needed} at least, not "
            f"{stage}",
            lambda: [f"parallel.zero_stage={needed}", "parallel.offload=none"],
        )


def _experts(config: Config, world_size: int) -> Iterator[_Problem]:
    parallel, experts = config.parallel, _used_experts(config)
    if not experts:
        asked = {
            "ep": (parallel.ep, 1),
            "moe_recompute": (parallel.moe_recompute, "none"),
            "recompute_above": (parallel.recompute_above, None),
            "hot_experts": (parallel.hot_experts, 0),
        }
        for key, (value, default) in asked.items():
            if value != default:
                off = "null" if default is None else default
                yield _Problem(
                    f"parallel.{key}={value} needs a layer with experts, and model.layers has none",
                    _these(f"parallel.{key}={off}"),
                )
    stage_size = world_size // parallel.pp
    for name, moe in experts.items():
        if moe.num_experts % parallel.ep or stage_size % parallel.ep:
            yield _Problem(
                f"parallel.ep={parallel.ep} must divide model.ffns.{name}.moe.num_experts="
                f"{moe.num_experts} and the {stage_size} ranks of a pipeline stage",
                lambda: _near_degrees(config, world_size, "ep") or ["parallel.ep=1"],
            )
        if parallel.hot_experts and moe.capacity is not None:
            yield _Problem(
                f"parallel.hot_experts={parallel.hot_experts} cannot be with model.ffns.{name}.moe."
                f"capacity={moe.capacity}, which gives every expert as many tokens",
                _these("parallel.hot_experts=0", f"model.ffns.{name}.moe.capacity=null"),
            )


def _batch(config: Config, world_size: int) -> Iterator[_Problem]:
    parallel, data = config.parallel, config.data
    dp_size = world_size // (parallel.pp * parallel.ulysses * parallel.ring)
    unit = data.micro_batch_size * dp_size
    rounds = data.global_batch_size // unit
    if data.global_batch_size % unit:
        near = [n * unit for n in (rounds, rounds + 1) if n]
        yield _Problem(
            f"data.global_batch_size={data.global_batch_size} must be a multiple of "
            f"data.micro_batch_size={data.micro_batch_size} x {dp_size} data ranks",
            lambda: [f"data.global_batch_size={size}" for size in near],
        )


def _sequence(config: Config, world_size: int) -> Iterator[_Problem]:
    """More sequence ranks than heads or tokens can be shared among."""
    parallel, data = config.parallel, config.data

    def near() -> list[str]:
        degrees = _near_degrees(config, world_size, "ulysses", "ring")
        return degrees or ["parallel.ulysses=1 parallel.ring=1"]

    for name, mixer in _full_attention(config).items():
        try:
            plan_heads(mixer.num_heads, mixer.num_kv_heads, parallel.ulysses)
        except ValueError as error:
            yield _Problem(f"model.mixers.{name}: {str(error).partition(';')[0]}", near)
    needed = _count_segments(parallel)
    if data.seq_len * data.micro_batch_size < needed:
        contiguous = _replace(config, {"layout": "contiguous"})
        yield _Problem(
            f"data.seq_len={data.seq_len} x data.micro_batch_size={data.micro_batch_size} tokens "
            f"must be {needed} at least, one for each segment that parallel.ulysses="
            f"{parallel.ulysses} x parallel.ring={parallel.ring} in parallel.layout="
            f"{parallel.layout} has",
            lambda: [
                f"data.seq_len={math.ceil(needed / data.micro_batch_size)}",
                *(["parallel.layout=contiguous"] if _fits(contiguous, world_size) else []),
                *near(),
            ],
        )


def _these(*remedies: str) -> Callable[[], list[str]]:
    return lambda: list(remedies)


def _near_degrees(config: Config, world_size: int, *degrees: Degree) -> list[str]:
    """Return overrides for the two nearest of these degrees that fit.

    First come those that leave the number of data ranks, then those that share out as many ranks.
    """
    parallel = config.parallel
    given = [getattr(parallel, degree) for degree in degrees]
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    choices: list[tuple[tuple[bool, bool, float], str]] = []
    for sizes in itertools.product(divisors, repeat=len(degrees)):
        changes: dict[str, Any] = dict(zip(degrees, sizes, strict=True))
        if not _fits(_replace(config, changes), world_size):
            changes["dp"] = None
        if list(sizes) != given and _fits(_replace(config, changes), world_size):
            is_other = math.prod(sizes) != math.prod(given)
            distance = sum(abs(math.log(n / m)) for n, m in zip(sizes, given, strict=True))
            choices.append(
                (("dp" in changes, is_other, distance), _name_changes(parallel, changes))
            )
    return [text for _, text in sorted(choices, key=lambda choice: choice[0])[:2]]


def _near_worlds(config: Config, world_size: int) -> list[str]:
    """Return what gives a near number of ranks that fits the degrees."""
    parallel = config.parallel
    size = parallel.pp * parallel.ulysses * parallel.ring
    below = world_size // size
    counts = (parallel.dp,) if parallel.dp else (below, below + 1)
    sizes = [n * size for n in counts if n and _fits_world(config, n * size)]
    key = {
        "inline": "launcher=ray launcher.num_workers=",
        "ray": "launcher.num_workers=",
        "env": "WORLD_SIZE=",
    }[config.launcher.name]
    return [f"{key}{n}" for n in sizes or [size]]


def _fits_world(config: Config, world_size: int) -> bool:
    launcher = dataclasses.replace(config.launcher, name="ray")
    return _fits(dataclasses.replace(config, launcher=launcher), world_size)


def _replace(config: Config, changes: dict[str, Any]) -> Config:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **changes))


def _name_changes(parallel: ParallelConfig, changes: dict[str, Any]) -> str:
    """Return the overrides that change what differs."""
    return " ".join(
        f"parallel.{key}={'null' if value is None else value}"
        for key, value in changes.items()
        if value != getattr(parallel, key)
    )


def _count_segments(parallel: ParallelConfig) -> int:
    """Return the segments that all ranks of a sequence hold together."""
    is_zigzag = parallel.layout == "zigzag" and parallel.ring > 1
    return parallel.ulysses * parallel.ring * (2 if is_zigzag else 1)


def _full_attention(config: Config) -> dict[str, SoftmaxAttentionConfig]:
    """Return the mixers of full attention that a layer has, whose heads Ulysses shares out."""
    used = {name for layer in layer_list(config.model) for name in layer.mixers}
    return {
        name: mixer
        for name, mixer in config.model.mixers.items()
        if name in used and isinstance(mixer, SoftmaxAttentionConfig) and mixer.window_size is None
    }


def _used_experts(config: Config) -> dict[str, MoEConfig]:
    """Return what a layer has of experts, by the name of the FFN."""
    used = {layer.ffn for layer in layer_list(config.model)}
    return {n: f.moe for n, f in config.model.ffns.items() if n in used and f.moe is not None}
