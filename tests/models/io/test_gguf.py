"""GGUF files, written as llama.cpp does, give the logits of the model they were made of."""

import inspect
import json
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from helpers.foreign import imported_logits, make_transformers
from helpers.smollm2 import TEXT
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from models.io import read_foreign
from trainer.data.tokenizer import load_tokenizer

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "self_attn.": "attn_", "mlp.": "ffn_", "_proj": "",
    "model.layers.": "blk.", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "lm_head": "output",
}  # fmt: skip
"""Transformers' names to those of GGUF, replaced in turn."""


def write_gguf(path: Path, model: Any, *, architecture: str | None = None, **metadata: Any) -> Path:
    """Write a model of Transformers as llama.cpp's converter does, in float32."""
    config, rope = model.config, model.config.rope_parameters
    writer = gguf.GGUFWriter(path, architecture or config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    for name, tensor in gguf_tensors(model).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """Return the name in a GGUF file of a tensor of Transformers."""
    for theirs, ours in PARTS.items():
        name = name.replace(theirs, ours)
    return name


def gguf_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a GGUF file, channels of each head interleaved as Llama's are."""
    config, tensors = model.config, {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = name.split(".")[-2]
        if config.model_type == "llama" and part in heads:
            halves = tensor.unflatten(0, (heads[part], 2, -1))
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        tensors[gguf_name(name)] = tensor.contiguous()
    if config.rope_parameters["rope_type"] == "llama3":
        plain = LlamaRotaryEmbedding.compute_default_rope_parameters(config)[0]
        tensors["rope_freqs.weight"] = plain / model.model.rotary_emb.inv_freq
    return tensors


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {"tie_word_embeddings": True, "head_dim": 12}),
        ("llama", {"rope_parameters": LINEAR}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
    ids=["llama-tied", "llama-linear", "llama-llama3", "qwen2", "qwen3"],
)
def test_logits_equal_those_of_transformers(
    model_type: str, config: dict[str, Any], tmp_path: Path
) -> None:
    theirs = make_transformers(model_type, **config)
    path = write_gguf(tmp_path / "model.gguf", theirs)
    tokens = torch.randint(40, (1, 60))
    with torch.no_grad():
        expected = theirs(tokens).logits[0]
    torch.testing.assert_close(imported_logits(path, tokens), expected, atol=1e-5, rtol=0)


def test_what_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    model = make_transformers("llama", rope_parameters=LLAMA3 | {"low_freq_factor": 2.0})
    with pytest.raises(ValueError, match=r"rope_freqs.weight is not the scaling of Llama 3"):
        read_foreign(str(write_gguf(tmp_path / "factors.gguf", model)))
    model = make_transformers("qwen2")
    with pytest.raises(ValueError, match=r"general.architecture=gemma; llama, qwen2, qwen3 are"):
        read_foreign(str(write_gguf(tmp_path / "gemma.gguf", model, architecture="gemma")))
    with pytest.raises(ValueError, match="a sliding window are not read"):
        read_foreign(str(write_gguf(tmp_path / "window.gguf", model, sliding_window=8)))
    (tmp_path / "text.gguf").write_text("no such format, but long enough to be looked into")
    with pytest.raises(ValueError, match=r"text.gguf cannot be read as GGUF"):
        read_foreign(str(tmp_path / "text.gguf"))


def patterns() -> dict[str, str]:
    """Return Transformers' regular expressions by the name that GGUF has for them."""
    llama = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    return {"qwen2": PRETOKENIZE_REGEX, "llama-bpe": llama}


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
def test_tokenizers_give_the_ids_of_transformers(pre: str, tmp_path: Path) -> None:
    theirs = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    theirs.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(patterns()[pre]), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    specials = ["<s>", "</s>"]
    theirs.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    theirs.save(str(tmp_path / "theirs.json"))
    model = json.loads((tmp_path / "theirs.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    metadata = {
        "tokenizer_model": "gpt2", "tokenizer_pre": pre, "token_list": tokens,
        "token_types": [3 if token in specials else 1 for token in tokens],
        "token_merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 0, "eos_token_id": 1, "add_bos_token": True,
    }  # fmt: skip
    weights = make_transformers(pre.replace("-bpe", ""), vocab_size=400)
    read_foreign(str(write_gguf(tmp_path / "a.gguf", weights, **metadata))).save_tokenizer(tmp_path)
    ours = load_tokenizer(str(tmp_path))
    text = "It's 2026,  isn't it?\r\n\n A cafe\u0301 in the harbour\tof Marta's... </s>"
    composed = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    ids = theirs.encode(composed).ids
    assert list(ours.encode(text)) == ids
    assert (ids[-1], ours.eos_id, ours.decode(ids)) == (1, 1, composed.removesuffix("</s>"))
    with_bos = transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert with_bos == [0, *ids]


def test_a_tokenizer_that_cannot_be_written_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "a.gguf", make_transformers("qwen2"), tokenizer_model="llama")
    read_foreign(str(path)).save_tokenizer(tmp_path / "out")
    assert "no tokenizer.json is written for tokenizer.ggml.model=llama" in caplog.text
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["config.json"]
