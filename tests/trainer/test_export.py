"""What is exported loads where it should, and comes back as it was."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from helpers.foreign import FAMILIES, save_transformers
from helpers.models import build_model, compose_config, tiny_model_config
from safetensors.torch import load_file

from conf.schema import ExportConfig, ModelConfig
from models.io import Foreign, read_foreign
from trainer.checkpoint import CheckpointStore, load_tensors
from trainer.export import export_run
from trainer.new_run import write_run


def write_model(
    out: Path, config: ModelConfig, tensors: dict[str, torch.Tensor], *, tokenizer: str = "bytes"
) -> Path:
    """Write a run directory with these weights."""
    run = compose_config()
    data = dataclasses.replace(run.data, tokenizer=tokenizer)
    run = dataclasses.replace(run, model=config, data=data)
    named = {f"model/{name}": tensor for name, tensor in tensors.items()}
    write_run(run, named.items(), str(out), total_bytes=0)
    return out


def write_imported(out: Path, foreign: Foreign) -> Path:
    """Write a run directory with the weights of a foreign checkpoint and its tokenizer."""
    tensors = {name: foreign.tensors.get(name) for name in foreign.tensors.shapes}
    write_model(out, foreign.config, tensors)
    foreign.save_tokenizer(out / "tokenizer")
    return out


def export(run: Path, out: Path, *, dtype: Any = "float32", **options: Any) -> Path:
    """Export a run and return the folder."""
    keys = {key: options.pop(key) for key in list(options) if key != "max_shard_bytes"}
    return export_run(ExportConfig(run=str(run), out=str(out), dtype=dtype, **keys), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_model_goes_out_byte_for_byte(family: str, tmp_path: Path) -> None:
    save_transformers(tmp_path / "theirs", family, dtype=torch.bfloat16)
    run = write_imported(tmp_path / "run", read_foreign(str(tmp_path / "theirs")))
    out = export(run, tmp_path / "out", dtype="bfloat16")
    before, after = contents(tmp_path / "theirs"), contents(out)
    assert after["model.safetensors"] == before["model.safetensors"]
    assert json.loads(after["config.json"]) == json.loads(before["config.json"])
    assert after["generation_config.json"] == before["generation_config.json"]


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_we_describe(family: str, tmp_path: Path) -> None:
    theirs = save_transformers(tmp_path / "theirs", family)
    foreign = read_foreign(str(tmp_path / "theirs"))
    tensors = {name: foreign.tensors.get(name) for name in foreign.tensors.shapes}
    out = export(write_model(tmp_path / "run", foreign.config, tensors), tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert again.dtype == torch.float32
    tokens = torch.randint(40, (1, 60))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    assert read_foreign(str(out)).config == foreign.config


def test_the_tokenizer_and_unknown_keys_survive_shards_and_a_second_round(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    save_transformers(theirs, "qwen3")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (theirs / name).write_text(f"content of {name}")
    values = json.loads((theirs / "config.json").read_text()) | {"torch_dtype": "bfloat16", "x": 3}
    del values["dtype"]
    (theirs / "config.json").write_text(json.dumps(values))
    folders = []
    for number in range(2):
        source = folders[-1] if folders else theirs
        run = write_imported(tmp_path / f"run{number}", read_foreign(str(source)))
        folders.append(export(run, tmp_path / f"out{number}", max_shard_bytes=30_000))
    first, second = map(contents, folders)
    assert len([name for name in first if name.endswith(".safetensors")]) > 3
    assert first == second
    assert json.loads(first["config.json"]) == values | {"torch_dtype": "float32"}
    assert first["chat_template.jinja"] == b"content of chat_template.jinja"
    assert first["tokenizer.json"] == b"content of tokenizer.json"


def test_a_longer_context_is_written_into_the_config(tmp_path: Path) -> None:
    save_transformers(tmp_path / "theirs", "llama-yarn")
    foreign = read_foreign(str(tmp_path / "theirs"))
    run = write_imported(tmp_path / "run", foreign)
    folder = run / "checkpoints" / "step_00000000"
    trained = CheckpointStore(folder.parent, keep=2)
    trained.begin(3)
    tensors = load_tensors(folder)
    trained.write_shard(3, 0, {name: tensors.get(name) for name in tensors})
    trained.commit(3, {})
    out = export(run, tmp_path / "out")
    values = json.loads((out / "config.json").read_text())
    assert values["max_position_embeddings"] == 1024  # data.seq_len of the run
    assert read_foreign(str(out)).config == foreign.config
    before = export(folder, tmp_path / "before")
    assert json.loads((before / "config.json").read_text())["max_position_embeddings"] == 64


@pytest.mark.parametrize("beside", ["llama", "gpt2", "nothing"])
def test_a_run_without_a_tokenizer_of_its_own_has_that_of_its_data(
    beside: str, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    save_transformers(theirs, "llama-tied")
    foreign = read_foreign(str(theirs))
    tensors = {name: foreign.tensors.get(name) for name in foreign.tensors.shapes}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 39}))
    tokenizer.save(str(theirs / "tokenizer.json"))
    values = foreign.values | {"model_type": beside, "eos_token_id": 7, "architectures": ["A"]}
    if beside == "nothing":
        (theirs / "config.json").unlink()
    else:
        (theirs / "config.json").write_text(json.dumps(values))
    run = write_model(tmp_path / "run", foreign.config, tensors, tokenizer=str(theirs))
    out = export(run, tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()
    written = json.loads((out / "config.json").read_text())
    assert written["eos_token_id"] == (39 if beside == "nothing" else 7)
    assert (written["model_type"], written == values) == ("llama", beside == "llama")


def test_weights_without_a_place_in_the_format_are_listed(tmp_path: Path) -> None:
    config = tiny_model_config("full")
    tensors = dict(build_model(config).named_parameters())
    tensors["layers.0.mixer.gate"] = tensors.pop("norm.weight")
    run = write_model(tmp_path / "run", config, tensors)
    with pytest.raises(ValueError, match=r"=huggingface .* layers.0.mixer.gate, norm.weight;"):
        export(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    weights = load_file(export(run, tmp_path / "out", format="longaxon") / "model.safetensors")
    assert weights.keys() == tensors.keys()


def test_integers_are_not_exported_as_weights(tmp_path: Path) -> None:
    run = write_model(tmp_path / "run", tiny_model_config("full"), {"norm.weight": torch.ones(32)})
    text = (run / "config.yaml").read_text()
    assert "quantization: null" in text
    (run / "config.yaml").write_text(text.replace("quantization: null", "quantization: {}"))
    with pytest.raises(ValueError, match=r"is in INT8, .* export the run that it was made from"):
        export(run, tmp_path / "out")
