"""The published SpikingBrain-7B: linear attention and window attention in turn (model_type gla_swa,
arXiv:2509.05276). Rank 16 and normaliser 16 of the gate are constants of the published code, and
biases on q, k and v as well. `sliding_window` is read as eq. 2 has it, the token itself included;
the published kernels see one token more.
"""

from typing import Any

from conf.schema import ModelConfig, build
from models.causal_lm import shortest_period
from models.io.compare import mixer_configs
from models.mixers.softmax_attention import SoftmaxAttentionConfig

MODEL_TYPE = "gla_swa"
_LINEAR = "models.mixers.linear_attention.LinearAttentionConfig"
_SOFTMAX = "models.mixers.softmax_attention.SoftmaxAttentionConfig"
_FIXED = {
    "hidden_act": "swish",
    "attn_mode": "chunk",
    "use_short_conv": False,
    "elementwise_affine": True,
    "gate_low_rank_dim": 16,
    "gate_logit_normalizer": 16,
}
_REQUIRED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "sliding_window", "attn_layers", "rope_theta", "norm_eps",
)  # fmt: skip


def read_config(values: dict[str, Any]) -> ModelConfig:
    """Return our config of the model that a config.json describes.

    Raises:
        ValueError: a key is missing, or has a value other than the published code's; lists them.
    """
    missing = [key for key in _REQUIRED if values.get(key) is None]
    wrong = [
        f"{key}={values[key]} ({value} is read)"
        for key, value in _FIXED.items()
        if key != "attn_mode" and values.get(key, value) not in (value, _same(value))
    ]
    if missing or wrong:
        lacks = [f"lacks {', '.join(missing)}"] if missing else []
        raise ValueError(f"config.json of {MODEL_TYPE} {'; '.join(lacks + wrong)}")
    heads, layers = values["num_attention_heads"], range(values["num_hidden_layers"])
    shape = {
        "num_heads": heads,
        "num_kv_heads": values["num_key_value_heads"],
        "head_dim": values["hidden_size"] // heads,
        "qkv_bias": True,
    }
    linear = {
        "_target_": _LINEAR, "gate": "low_rank", "gate_rank": 16, "gate_normalizer": 16.0,
        "feature_map": "relu", **shape,
    }  # fmt: skip
    window = {
        "_target_": _SOFTMAX, "window_size": values["sliding_window"],
        "rope_theta": float(values["rope_theta"]), **shape,
    }  # fmt: skip
    names = ["window" if i in values["attn_layers"] else "linear" for i in layers]
    mixers = {"linear": linear, "window": window}
    return build(ModelConfig, {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": len(layers),
        "layers": [{"mixers": [name], "ffn": "dense"} for name in shortest_period(names)],
        "mixers": {name: mixers[name] for name in dict.fromkeys(names)},
        "ffns": {"dense": {"intermediate_size": values["intermediate_size"]}},
        "norm_eps": values["norm_eps"],
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "init_std": values.get("initializer_range") or 0.02,
    })  # fmt: skip


def write_config(config: ModelConfig, max_position_embeddings: int) -> dict[str, Any]:
    """Return the config.json, with the published keys, that comes closest to a model.

    What the layout cannot express is not there: see `models.io.compare.differences`.
    """
    mixers = [mixers[0] for mixers in mixer_configs(config)]
    softmax = {i: m for i, m in enumerate(mixers) if isinstance(m, SoftmaxAttentionConfig)}
    windows = [mixer for mixer in softmax.values() if mixer.window_size]
    # Without a layer that says otherwise, as in the published model.
    window, theta = (windows[0].window_size, windows[0].rope_theta) if windows else (4096, 1e6)
    return {
        "architectures": ["GLAswaForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": mixers[0].num_heads,
        "num_key_value_heads": mixers[0].num_kv_heads,
        "intermediate_size": config.ffns[config.layers[0].ffn].intermediate_size,
        "hidden_act": "swish",
        "sliding_window": window,
        "attn_layers": list(softmax),
        "attn_mode": "chunk",
        "use_short_conv": False,
        "conv_size": 4,
        "rope_theta": theta,
        "max_position_embeddings": max_position_embeddings,
        "norm_eps": config.norm_eps,
        "elementwise_affine": True,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _same(value: Any) -> Any:
    return "silu" if value == "swish" else value
