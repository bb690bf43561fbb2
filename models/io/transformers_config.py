"""The architecture in config.json of the families Llama, Mistral, Qwen2/2.5 and Qwen3."""

from typing import Any, NamedTuple

from conf.schema import ModelConfig, RopeScaling, build
from models.causal_lm import shortest_period
from models.io.compare import mixer_configs
from models.mixers.softmax_attention import SoftmaxAttentionConfig

_SOFTMAX = "models.mixers.softmax_attention.SoftmaxAttentionConfig"
_ROPE_KEYS = {  # theirs to ours, by kind
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_seq_len",
        "low_freq_factor": "slow",
        "high_freq_factor": "fast",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_seq_len",
        "beta_slow": "slow",
        "beta_fast": "fast",
        "attention_factor": "attention_factor",
    },
}
_ROPE_DEFAULTS = {"yarn": {"slow": 1.0, "fast": 32.0}}


class Family(NamedTuple):
    """What is the same in all models of a family."""

    architecture: str
    qkv_bias: bool
    qk_norm: bool
    default_window: int | None
    """Window where config.json does not speak of it; None: full attention."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", qkv_bias=False, qk_norm=False, default_window=None),
    "mistral": Family("MistralForCausalLM", qkv_bias=False, qk_norm=False, default_window=4096),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, qk_norm=False, default_window=None),
    "qwen3": Family("Qwen3ForCausalLM", qkv_bias=False, qk_norm=True, default_window=None),
}


def read_config(values: dict[str, Any]) -> ModelConfig:
    """Return our config of the model that a config.json describes.

    Raises:
        ValueError: a key is missing, or has a value that our layers cannot express; lists them.
    """
    required = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "rms_norm_eps",
    )  # fmt: skip
    family = FAMILIES[values["model_type"]]
    if missing := [key for key in required if values.get(key) is None]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    reasons = _reasons(values)
    if reasons:
        raise ValueError("config.json asks for what no layer here computes: " + "; ".join(reasons))
    heads = values["num_attention_heads"]
    theta, scaling = _read_rope(values)
    mixer = {
        "_target_": _SOFTMAX,
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
        "window_size": None,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
    }
    windows = _windows(values, family)
    names = ["full" if window is None else "window" for window in windows]
    return build(ModelConfig, {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "layers": [{"mixers": [name], "ffn": "dense"} for name in shortest_period(names)],
        "mixers": {
            name: mixer | {"window_size": window}
            for name, window in zip(names, windows, strict=True)
        },
        "ffns": {"dense": {"intermediate_size": values["intermediate_size"]}},
        "norm_eps": values["rms_norm_eps"],
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "init_std": values.get("initializer_range") or 0.02,
    })  # fmt: skip


def write_config(config: ModelConfig, max_position_embeddings: int) -> dict[str, Any]:
    """Return the config.json of the family that comes closest to a model.

    What the family cannot express is not there: see `models.io.compare.differences`.
    """
    layers = mixer_configs(config)
    softmax = [
        mixer for mixers in layers for mixer in mixers if isinstance(mixer, SoftmaxAttentionConfig)
    ]
    if not softmax:
        raise ValueError("no layer has softmax attention")
    first, windows = softmax[0], [getattr(mixers[0], "window_size", None) for mixers in layers]
    model_type = _closest(first, windows)
    values = {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffns[config.layers[0].ffn].intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": first.rope_theta,
        "rope_scaling": _write_scaling(first.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if model_type in ("llama", "qwen3"):
        values["attention_bias"] = False
    if model_type == "llama":
        values["mlp_bias"] = False
    elif model_type == "mistral":
        values["sliding_window"] = first.window_size
    else:
        values |= _write_windows(windows)
    return values


def _reasons(values: dict[str, Any]) -> list[str]:
    """Return what of the config cannot be expressed."""
    reasons = []
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        reasons.append(f"hidden_act={values['hidden_act']} (silu is there)")
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            reasons.append(f"{key}=true (biases are there on q, k and v of Qwen2 alone)")
    if _rope_values(values).get("truncate") is False:
        reasons.append("truncate=false of the rotary embedding")
    if values.get("quantization_config"):
        reasons.append("quantization_config (weights in float32, bfloat16 or float16 are read)")
    kind = _rope_values(values).get("rope_type", "default")
    if kind != "default" and kind not in _ROPE_KEYS:
        reasons.append(f"rope_type={kind} (default, {', '.join(_ROPE_KEYS)} are there)")
    for key in ("mscale", "mscale_all_dim"):
        if _rope_values(values).get(key):
            reasons.append(f"{key} of the rotary embedding (attention_factor is there)")
    if _rope_values(values).get("partial_rotary_factor", 1.0) != 1.0:
        reasons.append("partial_rotary_factor other than 1")
    return reasons


def _rope_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings of the rotary embedding, which older files spread over three keys."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", None) or "default")
    for key in ("rope_theta", "partial_rotary_factor"):
        if key not in rope and values.get(key) is not None:
            rope[key] = values[key]
    return rope


def _read_rope(values: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return the base, and the scaling of frequencies as RopeScaling knows it."""
    rope = _rope_values(values)
    theta, kind = float(rope.get("rope_theta", 10000.0)), rope["rope_type"]
    if kind == "default":
        return theta, None
    rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    scaling = {"kind": kind} | _ROPE_DEFAULTS.get(kind, {})
    for their_key, key in _ROPE_KEYS[kind].items():
        if rope.get(their_key) is not None:
            scaling[key] = rope[their_key]
    return theta, scaling


def _windows(values: dict[str, Any], family: Family) -> list[int | None]:
    """Return the window of every layer, None for full attention."""
    num_layers = values["num_hidden_layers"]
    window = values.get("sliding_window", family.default_window)
    if family.architecture.startswith("Qwen"):
        if not values.get("use_sliding_window", False):
            window = None
        first = values.get("max_window_layers", 28)
    else:
        # Llama knows no window, whatever its config.json says.
        window = window if values["model_type"] == "mistral" else None
        first = 0
    kinds = values.get("layer_types")
    if window is None or not kinds:
        return [window if i >= first else None for i in range(num_layers)]
    known = {"full_attention": None, "sliding_attention": window}
    if unknown := sorted(set(kinds) - known.keys()):
        raise ValueError(f"config.json has layer_types {unknown}; {list(known)} are read")
    if len(kinds) != num_layers:
        raise ValueError(f"config.json has {len(kinds)} layer_types for {num_layers} layers")
    return [known[kind] for kind in kinds]


def _closest(mixer: SoftmaxAttentionConfig, windows: list[int | None]) -> str:
    if mixer.qk_norm:
        return "qwen3"
    if mixer.qkv_bias:
        return "qwen2"
    return "mistral" if all(windows) else "llama"


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    keys = _ROPE_KEYS[scaling.kind].items()
    found = {theirs: getattr(scaling, ours) for theirs, ours in keys}
    return {"rope_type": scaling.kind} | {k: v for k, v in found.items() if v is not None}


def _write_windows(windows: list[int | None]) -> dict[str, Any]:
    """Return Qwen's keys: older code looks at max_window_layers, newer code at the list."""
    kinds = ["full_attention" if w is None else "sliding_attention" for w in windows]
    return {
        "use_sliding_window": any(windows),
        "sliding_window": next((window for window in windows if window), None),
        "max_window_layers": kinds.count("full_attention"),
        "layer_types": kinds,
    }
