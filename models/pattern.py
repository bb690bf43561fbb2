"""The architecture that a pattern makes of a pretrained Transformer's: other mixers, experts."""

import dataclasses
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from conf.schema import FFNConfig, LayerConfig, ModelConfig, PatternConfig, extension
from models.causal_lm import layer_list, shortest_period
from models.convert import ROTARY
from models.mixers.softmax_attention import SoftmaxAttentionConfig

SOURCE = "source"
"""Stands in a pattern for the attention that the layers have, or for a setting of it."""
INHERITED = ("num_heads", "num_kv_heads", "head_dim", "qkv_bias", "qk_norm")
"""What a mixer takes from that attention where the pattern gives nothing; also ROTARY where it
gives neither."""


def remap(model: ModelConfig, pattern: PatternConfig) -> ModelConfig:
    """Return a Transformer's architecture with the mixers and FFNs of a pattern.

    Raises:
        ValueError: the model is no plain Transformer, or the pattern does not fit it.
    """
    layers = layer_list(model)
    for key in ("keep_full", "keep_dense"):
        if outside := [i for i in getattr(pattern, key) if i >= len(layers)]:
            raise ValueError(
                f"pattern.{key} names {outside}; the model has layers 0 to {len(layers) - 1}"
            )
    rows, mixers = [layer.mixers for layer in layers], model.mixers
    if pattern.layers is not None:
        rows, mixers = _remap_mixers(model, pattern, pattern.layers)
    ffns, made = _remap_ffns(model, pattern)
    layers = [LayerConfig(mixers=row, ffn=ffn) for row, ffn in zip(rows, ffns, strict=True)]
    return dataclasses.replace(
        model,
        layers=shortest_period(layers),
        mixers=mixers,
        ffns=made,
        num_sinks=model.num_sinks if pattern.num_sinks is None else pattern.num_sinks,
    )


def _remap_mixers(
    model: ModelConfig, pattern: PatternConfig, repeated: list[list[str]]
) -> tuple[list[list[str]], dict[str, Any]]:
    """Return the names of every layer's mixers, and the mixers by name."""
    name, attention = _attention(model)
    if model.num_layers % len(repeated):
        raise ValueError(
            f"pattern.layers has {len(repeated)} entries, which do not fit {model.num_layers} "
            f"layers a whole number of times; list {model.num_layers}, or a divisor of it"
        )
    rows = repeated * (model.num_layers // len(repeated))
    rows = [pattern.full if i in pattern.keep_full else row for i, row in enumerate(rows)]
    used = dict.fromkeys(mixer for row in rows for mixer in row)
    if SOURCE in used and name in used:
        raise ValueError(
            f"pattern.layers names a mixer {name!r} as the attention that other layers keep; call "
            "it something else"
        )
    mixers = {
        name if mixer == SOURCE else mixer: (
            attention if mixer == SOURCE else _mixer(mixer, pattern, attention)
        )
        for mixer in used
    }
    return [[name if mixer == SOURCE else mixer for mixer in row] for row in rows], mixers


def _attention(model: ModelConfig) -> tuple[str, SoftmaxAttentionConfig]:
    """Return the one mixer of all layers; ValueError if there is another or it is not softmax."""
    rows = {tuple(layer.mixers) for layer in layer_list(model)}
    mixers = sorted({name for row in rows for name in row})
    config = model.mixers[mixers[0]]
    if len(rows) > 1 or len(mixers) > 1 or not isinstance(config, SoftmaxAttentionConfig):
        kinds = ", ".join(f"{n} ({type(model.mixers[n]).__name__})" for n in mixers)
        raise ValueError(
            f"the source's layers have {kinds}; a pattern takes one softmax attention, the same in "
            "every layer. Convert the Transformer that it was made of, or give model=<preset>"
        )
    return mixers[0], config


def _mixer(name: str, pattern: PatternConfig, attention: SoftmaxAttentionConfig) -> Any:
    """Return a mixer's config, of the sizes of the attention whose projections it gets."""
    if name not in pattern.mixers:
        raise ValueError(
            f"pattern names the mixer {name!r}, which is not in pattern.mixers; there are "
            f"{', '.join((SOURCE, *pattern.mixers))}"
        )
    given = {key: value for key, value in pattern.mixers[name].items() if value != SOURCE}
    keys = INHERITED if any(key in given for key in ROTARY) else INHERITED + ROTARY
    inherited = {key: dataclasses.asdict(attention)[key] for key in keys}
    adapter = TypeAdapter(Annotated[Any, extension("models.mixers")])
    try:
        return adapter.validate_python(inherited | given)
    except ValidationError as error:
        problems = (
            ".".join(("pattern.mixers", name, *map(str, e["loc"])))
            + f": {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        )
        raise ValueError("; ".join(problems)) from error


def _remap_ffns(
    model: ModelConfig, pattern: PatternConfig
) -> tuple[list[str], dict[str, FFNConfig]]:
    """Return the name of every layer's FFN, and the FFNs by name."""
    names = [layer.ffn for layer in layer_list(model)]
    if pattern.moe is None:
        return names, model.ffns
    if any(model.ffns[name].moe for name in names):
        raise ValueError("pattern.moe: the source has experts; leave pattern.moe=null")
    made = dict(model.ffns)
    for i, name in enumerate(names):
        if i not in pattern.keep_dense:
            names[i] = f"{name}_moe"
            made[names[i]] = dataclasses.replace(model.ffns[name], moe=pattern.moe)
    return names, {name: made[name] for name in dict.fromkeys(names)}
