"""Folders that Transformers wrote give its logits, whatever the family; what cannot be read is
refused by name.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.foreign import (
    FAMILIES,
    build_imported,
    imported_logits,
    model_logits,
    one_document,
    save_transformers,
)
from safetensors.torch import load_file, save_file

from models.io import is_foreign, read_foreign
from models.io.read import read_config
from ops.rotary import rotary_table


def edit_json(file: Path, **changes: Any) -> dict[str, Any]:
    """Set keys of a JSON file, remove those set to ..., and return the outcome."""
    values = json.loads(file.read_text()) | changes
    values = {key: value for key, value in values.items() if value is not ...}
    file.write_text(json.dumps(values))
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    theirs = save_transformers(tmp_path, family)
    tokens = torch.randint(40, (1, 60))
    with torch.no_grad():
        expected = theirs(tokens).logits[0]
    assert float(expected.std()) > 0.3
    assert is_foreign(str(tmp_path))
    torch.testing.assert_close(imported_logits(tmp_path, tokens), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama-tied", "llama-linear", "llama-llama3", "llama-yarn"])
def test_rotary_angles_are_those_of_transformers_far_into_a_text(
    family: str, tmp_path: Path
) -> None:
    theirs = save_transformers(tmp_path, family).model.rotary_emb
    mixer = read_foreign(str(tmp_path)).config.mixers["full"]
    positions = torch.tensor([100_000, 131_071])
    cos, sin = rotary_table(positions, mixer.head_dim, mixer.rope_theta, mixer.rope_scaling)
    for ours, expected in zip((cos, sin), theirs(torch.zeros(1), positions[None]), strict=True):
        torch.testing.assert_close(ours, expected[0, :, : ours.shape[1]], atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-llama3", "llama-yarn", "qwen3-window7"])
def test_decoding_equals_the_parallel_forward(family: str, tmp_path: Path) -> None:
    save_transformers(tmp_path, family)
    model = build_imported(read_foreign(str(tmp_path)))
    tokens = torch.randint(40, (1, 30))
    expected, cache = model_logits(model, tokens), model.new_cache()
    logits = [model.prefill(tokens[:, :20], one_document(20), cache)]
    logits += [model.decode(tokens[:, i : i + 1], cache, i) for i in range(20, 30)]
    torch.testing.assert_close(torch.cat(logits), expected[19:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shards_of_any_dtype_are_read_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = save_transformers(tmp_path, "qwen3", dtype=dtype, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tensors = read_foreign(str(tmp_path)).tensors
    weight = tensors.get("layers.1.mixer.branches.full.q_proj.weight")
    assert weight.dtype == torch.float32
    assert tensors.shapes["layers.1.mixer.branches.full.q_proj.weight"] == weight.shape
    assert torch.equal(weight, theirs.model.layers[1].self_attn.q_proj.weight)


@pytest.mark.parametrize("family", ["llama-linear", "mistral-yarn-given", "qwen2-window7"])
def test_configs_of_older_versions_mean_the_same(family: str, tmp_path: Path) -> None:
    save_transformers(tmp_path, family)
    config = read_foreign(str(tmp_path)).config
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    edit_json(
        tmp_path / "config.json", rope_theta=theta, layer_types=..., rope_parameters=...,
        rope_scaling=None if kind == "default" else {"type": kind} | rope,
    )  # fmt: skip
    assert read_foreign(str(tmp_path)).config == config


def test_keys_that_old_files_lack_have_the_values_of_transformers(tmp_path: Path) -> None:
    save_transformers(tmp_path, "llama-tied")
    values = edit_json(
        tmp_path / "config.json", num_key_value_heads=..., head_dim=..., rope_parameters=...,
        tie_word_embeddings=..., initializer_range=...,
    )  # fmt: skip
    config, _ = read_config(values)
    mixer = config.mixers["full"]
    assert (mixer.num_kv_heads, mixer.head_dim, mixer.rope_theta) == (4, 12, 1e4)
    assert (config.tie_embeddings, config.init_std) == (False, 0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias=true .*; mlp_bias=true"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ({"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "rope_type=longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"vocab_size": ..., "rms_norm_eps": ...}, "lacks vocab_size, rms_norm_eps"),
        ({"model_type": "gpt_neox"}, "model_type='gpt_neox'; llama, mistral, qwen2, qwen3"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_what_no_layer_computes_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_transformers(tmp_path, "llama-yarn")
    values = edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        read_config(values)


def test_unknown_layer_types_are_refused(tmp_path: Path) -> None:
    save_transformers(tmp_path, "qwen3-window7")
    kinds = ["sliding_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"layer_types \['chunked_attention'\]"):
        read_config(edit_json(tmp_path / "config.json", layer_types=kinds))
    with pytest.raises(ValueError, match="2 layer_types for 3 layers"):
        read_config(edit_json(tmp_path / "config.json", layer_types=kinds[::2]))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder with one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_unknown_missing_and_wrongly_shaped_tensors_are_listed(tmp_path: Path) -> None:
    save_transformers(tmp_path, "llama-linear")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.self_attn.q_proj.weight"] = torch.zeros(3)
        tensors["score.weight"] = torch.zeros(3)
        del tensors["lm_head.weight"], tensors["model.layers.1.input_layernorm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(65, 48)

    edit_tensors(tmp_path, change)
    with pytest.raises(ValueError, match="does not hold the tensors of its config") as error:
        read_foreign(str(tmp_path))
    assert str(error.value).split("; ")[1:] == [
        "unknown: model.layers.3.self_attn.q_proj.weight, score.weight",
        "missing: model.layers.1.input_layernorm.weight, lm_head.weight",
        "wrongly shaped: model.layers.0.mlp.up_proj.weight [65, 48] instead of [64, 48]",
    ]


def test_tied_heads_and_rotary_frequencies_may_be_stored_again(tmp_path: Path) -> None:
    save_transformers(tmp_path, "llama-tied")
    embed = "model.embed_tokens.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({
        "lm_head.weight": tensors[embed].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }))  # fmt: skip
    assert "head.weight" not in read_foreign(str(tmp_path)).tensors.shapes
    edit_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"; unknown: lm_head.weight$"):
        read_foreign(str(tmp_path))


def test_files_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    save_transformers(tmp_path, "qwen2", max_shard_size="30KB")
    file, *others = sorted(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({"stranger": torch.ones(1)} | {k: t for k, t in tensors.items() if k != name}, file)
    with pytest.raises(ValueError, match=f"do not hold the same tensors: {name}, stranger"):
        read_foreign(str(tmp_path))
    others[-1].unlink()
    with pytest.raises(ValueError, match=f"lacks {others[-1].name}"):
        read_foreign(str(tmp_path))


def test_only_floating_point_weights_in_safetensors_files_are_read(tmp_path: Path) -> None:
    save_transformers(tmp_path, "qwen2")
    name = "model.norm.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=r"not F32, BF16, F16, F64: model.norm.weight \(I8\)"):
        read_foreign(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no such format")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        read_foreign(str(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks model.safetensors; .* others can run code"):
        read_foreign(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pkg://no_such_package/a.gguf", "no package 'no_such_package' is installed"),
        ("pkg://torch/no.gguf", "there is no .*no.gguf"),
        ("/nonexistent/a.gguf", "there is no /nonexistent/a.gguf"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(path: str, message: str) -> None:
    assert is_foreign(path)
    with pytest.raises(ValueError, match=message):
        read_foreign(path)
