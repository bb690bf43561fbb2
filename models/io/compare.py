"""Architectures layer by layer: what they hold, how they repeat, in what two of them differ."""

from dataclasses import asdict
from typing import Any

from conf.schema import ModelConfig
from models.causal_lm import layer_list

_TOP = ("vocab_size", "hidden_size", "num_layers", "num_sinks", "norm_eps", "tie_embeddings")
_OF_ANY_KIND = ["mixer", "ffn", "intermediate_size"]


def differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """Return what of `config` is not so in `other`, as in "layers 0, 2: window_size=8, not None".

    Of mixers of another kind no more is said. How parameters are drawn does not count.
    """
    found = [
        f"{key}={getattr(config, key)}, not {getattr(other, key)}"
        for key in _TOP
        if getattr(config, key) != getattr(other, key)
    ]
    places: dict[str, list[str]] = {}
    for number, (mine, theirs) in enumerate(zip(_layers(config), _layers(other), strict=False)):
        keys = list(mine) if mine["mixer"] == theirs["mixer"] else _OF_ANY_KIND
        odd = [f"{k}={mine[k]}, not {theirs[k]}" for k in keys if mine[k] != theirs[k]]
        if odd:
            places.setdefault(", ".join(odd), []).append(str(number))
    return found + [f"layers {', '.join(numbers)}: {text}" for text, numbers in places.items()]


def mixer_configs(config: ModelConfig) -> list[list[Any]]:
    """Return the configs of each layer's mixers."""
    return [[config.mixers[name] for name in layer.mixers] for layer in layer_list(config)]


def _layers(config: ModelConfig) -> list[dict[str, Any]]:
    """Return each layer's settings; of a layer with other mixers than one, only which they are."""
    layers = []
    for layer, mixers in zip(layer_list(config), mixer_configs(config), strict=True):
        kinds = [type(mixer).__name__.removesuffix("Config") for mixer in mixers]
        ffn = config.ffns[layer.ffn]
        settings: dict[str, Any] = {
            "mixer": " + ".join(kinds),
            "ffn": "mixture of experts" if ffn.moe else "dense",
            "intermediate_size": ffn.intermediate_size,
        }
        layers.append(settings | asdict(mixers[0]) if len(mixers) == 1 else settings)
    return layers
