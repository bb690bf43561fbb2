"""Models that Hugging Face Transformers also has give its logits, weight by weight."""

from typing import Any

import pytest
import torch
from helpers.models import build_model, compose_config, one_rank_context
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from models.causal_lm import CausalLM

# Heads 9/3 as in SmolLM2, q, k and v with bias and a window as in Qwen2.5.
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 72,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "attn_implementation": "eager",
}
OURS = (
    "model=smollm2_135m", "model.hidden_size=72", "model.mixers.full.head_dim=8",
    "model.vocab_size=40", "model.ffns.dense.intermediate_size=96", "model.num_layers=3",
    "model.init_std=0.2",
)  # fmt: skip
WINDOW = (
    "+mixer@model.mixers.window=window_attention", "model.mixers.window.num_heads=9",
    "model.mixers.window.num_kv_heads=3", "model.mixers.window.head_dim=8",
    "model.mixers.window.window_size=7", "model.mixers.window.rope_theta=100000.0",
    "model.mixers.window.qkv_bias=true", "model.mixers.full.qkv_bias=true",
    "model.layers=[{mixers:[full],ffn:dense},{mixers:[window],ffn:dense}]",
    "model.tie_embeddings=false",
)  # fmt: skip
NAMES = {
    "embed.": "model.embed_tokens.",
    "head.": "lm_head.",
    "layers.": "model.layers.",
    "norm.": "model.norm.",
    "mixer.branches.full": "self_attn",
    "mixer.branches.window": "self_attn",
    "mixer_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    ".ffn.": ".mlp.",
}
"""Ours to theirs: a prefix, then parts of the rest."""


def make_llama() -> tuple[CausalLM, Any]:
    config = LlamaConfig(**SHAPE, tie_word_embeddings=True)
    return build_model(compose_config(*OURS).model), LlamaForCausalLM(config)


def make_qwen2() -> tuple[CausalLM, Any]:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    window = {"use_sliding_window": True, "sliding_window": 7, "layer_types": kinds}
    config = Qwen2Config(**SHAPE, **window, tie_word_embeddings=False)
    return build_model(compose_config(*OURS, *WINDOW).model), Qwen2ForCausalLM(config)


def rename(name: str) -> str:
    """Return their name of our parameter."""
    prefixes = [key for key in NAMES if key.endswith(".") and name.startswith(key)]
    name = NAMES[prefixes[0]] + name.removeprefix(prefixes[0])
    for ours in list(NAMES)[4:]:
        name = name.replace(ours, NAMES[ours])
    return name


@torch.no_grad()
@pytest.mark.parametrize("make", [make_llama, make_qwen2], ids=["llama", "qwen2-window7"])
def test_logits_equal_those_of_transformers(make: Any) -> None:
    ours, theirs = make()
    for name, parameter in ours.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.uniform_(0.5, 1.5)
    weights = {rename(name): tensor for name, tensor in ours.state_dict().items()}
    theirs.eval().load_state_dict(weights)  # strict: these names and no other
    tokens = torch.randint(40, (1, 50))
    expected = theirs(tokens).logits[0]
    assert float(expected.std()) > 0.1
    x, context = ours.embed(tokens), one_rank_context([50])
    for _, layer in ours.named_layers():
        x = layer(x, context)
    logits = ours.head.logits(ours.norm(x))[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
