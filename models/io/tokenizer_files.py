"""The files beside the weights: tokenizer, chat template, generation settings, config.json."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from models.io.gguf_file import GGUFFile, Metadata

logger = logging.getLogger(__name__)

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""What belongs to a model beside its weights and config.json."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"llama-bpe": _LLAMA3, "qwen2": _LLAMA3.replace("{1,3}", "")}
"""How text is cut before merging, by tokenizer.ggml.pre: from the models' tokenizer.json."""
_SMOLLM = "smollm"
_CONTROL, _USER_DEFINED = 3, 4


def copy_files(source: Path, folder: Path) -> None:
    """Copy what is there of FILES."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / "tokenizer.json").exists():
        logger.warning("%s has no tokenizer.json: set data.tokenizer yourself", source)


def write_gguf_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Write the tokenizer and the chat template that a GGUF file describes."""
    folder.mkdir(parents=True, exist_ok=True)
    get = file.metadata.get
    kind, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if kind != "gpt2" or (pre != _SMOLLM and pre not in _PATTERNS):
        logger.warning(
            "no tokenizer.json is written for tokenizer.ggml.model=%s, pre=%s: set data.tokenizer "
            "yourself", kind, pre,
        )  # fmt: skip
        return
    tokens: list[str] = get("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": get(f"{file.architecture}.context_length"),
    }
    ids: dict[str, int] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (index := get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            config[f"{ours}_token"] = tokens[index]
            ids[f"{ours}_token_id"] = int(index)
    if template := get("tokenizer.chat_template"):
        config["chat_template"] = template
    tokenizer = _build_tokenizer(pre, tokens, file.metadata)
    if get("tokenizer.ggml.add_bos_token") and "bos_token" in config:
        bos = config["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, ids["bos_token_id"])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))
    ids.pop("unk_token_id", None)
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2))


def _build_tokenizer(pre: str, tokens: list[str], metadata: Metadata) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token as it is, whether or not merges lead to it.
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(model)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    for wanted, add in (
        (_CONTROL, tokenizer.add_special_tokens),
        (_USER_DEFINED, tokenizer.add_tokens),
    ):
        found = [token for token, of_kind in zip(tokens, types, strict=False) if of_kind == wanted]
        add([AddedToken(t, special=wanted == _CONTROL, normalized=False) for t in found])
    return tokenizer


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre == _SMOLLM:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    words = pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, to_bytes])
