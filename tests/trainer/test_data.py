"""Data up to the shards: tokenizers, sources, the cache, and what errors say."""

import gzip
import io
import json
import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import yaml
from rich.console import Console

import conf
from conf.schema import DataConfig
from trainer.data import TextStream, TokenDataset, check_data, load_tokenizer, prepare
from trainer.data import shards as shards_module
from trainer.data.shards import load_ends, load_meta, tokens_file

EOS = 256
WORDS = ["spikes", "travel", "along", "the", "axon", "Ärger,", "你好", "or", "🧠"]


def load_group(name):
    file = Path(conf.__file__).parent / "data" / f"{name}.yaml"
    return DataConfig(**yaml.safe_load(file.read_text()))


def text_config(tmp_path, **changes):
    defaults = {"cache_dir": str(tmp_path / "cache"), "val_fraction": 0.3, "seq_len": 16}
    return replace(load_group("text"), **(defaults | changes))


def make_texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [f"{i}: " + " ".join(rng.choice(WORDS, size=rng.integers(1, 12))) for i in range(count)]


def write_jsonl(file, texts, key="text"):
    lines = [json.dumps({key: text, "id": i}) + "\n" for i, text in enumerate(texts)]
    file.write_text("".join(lines) + "\n", encoding="utf-8")


def write_tokenizer(folder, eos="<|endoftext|>", **config):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[eos], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(make_texts(50), trainer)
    tokenizer.enable_truncation(4)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def read_documents(folder, split, tokenizer):
    """Documents of a split as text; also checks that each ends with its end-of-document token."""
    tokens = np.fromfile(tokens_file(folder, split), load_meta(folder).dtype)
    documents = np.split(tokens, load_ends(folder, split))[:-1]
    assert all(document[-1] == tokenizer.eos_id for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def read_all(folder, tokenizer):
    return sorted(
        text for split in ("train", "val") for text in read_documents(folder, split, tokenizer)
    )


@pytest.fixture
def texts():
    return make_texts(60)


@pytest.fixture
def shards(tmp_path, texts):
    write_jsonl(tmp_path / "a.jsonl", texts)
    return prepare(text_config(tmp_path, path=str(tmp_path / "a.jsonl")))


# Tokenizers


def test_byte_tokenizer_returns_the_text():
    tokenizer = load_tokenizer("bytes")
    text = "Ärger 你好 🧠\r\n\0"
    ids = tokenizer.encode(text)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, EOS)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids, EOS]) == text


@pytest.mark.parametrize("kind", ["bytes", "hf"])
@pytest.mark.parametrize(
    "text", ["Ärger 你好 🧠\n", "🧠" * 40, "plain words " * 10, "a\ufffdb\ufffd"]
)
def test_text_stream_shows_whole_characters_only(tmp_path, kind, text):
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else str(write_tokenizer(tmp_path / "t")))
    stream = TextStream(tokenizer)
    shown = ""
    for token_id in tokenizer.encode(text):
        shown += stream.push(int(token_id))
        assert text.startswith(shown)
    assert shown.rstrip("\ufffd") == text.rstrip("\ufffd")
    assert shown + stream.finish() == text


def test_text_stream_replaces_an_unfinished_character_at_the_end_only():
    stream = TextStream(load_tokenizer("bytes"))
    assert [stream.push(i) for i in b"a\xe4\xbd"] == ["a", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.push(ord("b")) == "b"
    assert [stream.push(i) for i in b"\xff\xc3"] == ["", ""]
    assert stream.push(0xA9) == "\ufffdé"


def test_hf_tokenizer_from_folder_and_file(tmp_path, texts):
    folder = write_tokenizer(tmp_path / "t", eos="<stop>", eos_token={"content": "<stop>"})
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.encode(texts[0])
    assert len(ids) > 4, "the truncation stored in tokenizer.json must not apply"
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == texts[0]
    assert ids.max() < tokenizer.vocab_size
    assert load_tokenizer(str(folder / "tokenizer.json")).fingerprint == tokenizer.fingerprint


def test_hf_tokenizer_without_config_ends_documents_with_a_known_token(tmp_path):
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path / "t")))
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.eos_id == 0


# Sources


def write_corpus(folder, texts, form):
    """Write the texts as `form` and return what the config says about them."""
    folder.mkdir()
    whole = {"path": str(folder)}
    if form == "parquet":
        table = pa.table({"text": [*texts, None, ""], "id": list(range(len(texts) + 2))})
        pq.write_table(table, folder / "a.parquet", row_group_size=7)
        return whole
    if form in ("jsonl", "jsonl.gz", "url"):
        file = folder / "a.jsonl"
        write_jsonl(file, texts, key="body" if form == "jsonl.gz" else "text")
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
        fsspec.filesystem("memory").pipe("/a.jsonl", file.read_bytes())
        return {
            "jsonl": {"path": str(file)},
            "jsonl.gz": {"path": str(folder / "b.jsonl.gz"), "text_key": "body"},
            "url": {"path": "memory://a.jsonl"},
        }[form]
    files = [folder / f"{i:03}.{'dat' if form == 'dat' else 'txt'}" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    (folder / "empty.txt").touch()
    (folder / "README.md").write_text("not data")
    return {
        "folder": whole,
        "glob": {"path": str(folder / "*.txt")},
        "list": {"path": [*map(str, files[:7]), str(files[0]), str(folder / "*.txt")]},
        "dat": {"path": str(folder / "*.dat"), "format": "txt"},
    }[form]


@pytest.mark.parametrize(
    "form", ["folder", "glob", "list", "dat", "jsonl", "jsonl.gz", "url", "parquet"]
)
def test_every_form_of_input_gives_every_document_once(tmp_path, texts, form):
    config = text_config(tmp_path, **write_corpus(tmp_path / "corpus", texts, form))
    check_data(config)
    folder = prepare(config)
    assert read_all(folder, load_tokenizer("bytes")) == sorted(texts)
    counts = load_meta(folder).splits.values()
    assert sum(split.num_bytes for split in counts) == sum(len(text.encode()) for text in texts)


def test_hf_tokenizer_shards(tmp_path, texts):
    write_jsonl(tmp_path / "a.jsonl", texts)
    name = str(write_tokenizer(tmp_path / "t"))
    config = text_config(tmp_path, path=str(tmp_path / "a.jsonl"), tokenizer=name)
    tokenizer = load_tokenizer(name)
    folder = prepare(config)
    assert read_all(folder, tokenizer) == sorted(texts)
    assert load_meta(folder).vocab_size == tokenizer.vocab_size
    counts = load_meta(folder).splits["train"]
    num_labels = counts.num_tokens - counts.num_documents
    assert TokenDataset(folder, "train", 16, 0).bytes_per_label == counts.num_bytes / num_labels


def test_large_vocabulary_is_kept_in_uint32(tmp_path):
    vocab = {f"w{i}": i for i in range(0, 140_000, 2)} | {"</s>": 140_000}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w139998 w2")
    (tmp_path / "b.txt").write_text("w65536 w4")
    name = str(tmp_path / "tokenizer.json")
    folder = prepare(text_config(tmp_path, path=str(tmp_path), tokenizer=name, seq_len=2))
    assert (load_meta(folder).dtype, load_meta(folder).vocab_size) == ("uint32", 140_001)
    assert read_all(folder, load_tokenizer(name)) == ["w139998 w2", "w65536 w4"]


def test_stdlib_is_tokenised_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, "trainer.data")
    config = replace(load_group("stdlib"), cache_dir=str(tmp_path))
    check_data(config)
    folder = prepare(config)
    assert "tokenising standard library" in caplog.text
    written = tokens_file(folder, "train").stat()
    caplog.clear()
    assert (prepare(config), caplog.records) == (folder, [])
    assert tokens_file(folder, "train").stat() == written
    documents = read_documents(folder, "val", load_tokenizer("bytes"))
    assert 0 < len(documents) < load_meta(folder).splits["train"].num_documents
    assert all(documents)


# Shards


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_or_lines(tmp_path, texts, monkeypatch, caplog, terminal):
    caplog.set_level(logging.INFO, "trainer.data")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal)
    monkeypatch.setattr(shards_module, "Console", lambda stderr: console)
    monkeypatch.setattr(shards_module, "_LOG_SECONDS", 0.0)
    write_jsonl(tmp_path / "a.jsonl", texts)
    prepare(text_config(tmp_path, path=str(tmp_path / "a.jsonl")))
    assert ("tokens" in screen.getvalue()) == terminal
    assert ("tokenising: 100% read" in caplog.text) != terminal


def test_split_is_by_document_disjoint_and_the_same_for_any_order(tmp_path, texts):
    tokenizer = load_tokenizer("bytes")
    splits = []
    for name, ordered in (("a", texts), ("b", texts[::-1])):
        write_jsonl(tmp_path / f"{name}.jsonl", ordered)
        folder = prepare(text_config(tmp_path, path=str(tmp_path / f"{name}.jsonl")))
        splits.append([set(read_documents(folder, split, tokenizer)) for split in ("train", "val")])
    train, val = splits[0]
    assert splits[0] == splits[1]
    assert not train & val
    assert train | val == set(texts)
    assert 0.1 < len(val) / len(texts) < 0.5


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_both_splits_get_a_document(tmp_path, texts, val_fraction):
    write_jsonl(tmp_path / "a.jsonl", texts)
    path = str(tmp_path / "a.jsonl")
    folder = prepare(text_config(tmp_path, path=path, val_fraction=val_fraction, seq_len=4))
    assert read_all(folder, load_tokenizer("bytes")) == sorted(texts)
    splits = load_meta(folder).splits
    few = splits["val" if val_fraction < 0.5 else "train"]
    assert (few.num_documents, few.num_bytes) == (1, len(texts[-1].encode()))


def test_changed_input_is_tokenised_again(tmp_path, texts):
    file = tmp_path / "a.jsonl"
    write_jsonl(file, texts)
    config = text_config(tmp_path, path=str(file))
    first = prepare(config)
    assert prepare(replace(config, seq_len=8, global_batch_size=16)) == first
    assert prepare(replace(config, val_fraction=0.4)) != first
    write_jsonl(file, [*texts[::-1], "more"])
    assert prepare(config) != first


@pytest.mark.parametrize("damage", ["no meta", "half meta", "short tokens", "no ends", "half ends"])
def test_damaged_cache_is_built_again(tmp_path, texts, shards, caplog, damage):
    meta, ends = shards / "meta.json", shards / "val.ends.npy"
    if damage == "no meta":
        meta.unlink()
    elif damage == "half meta":
        meta.write_text(meta.read_text()[:50])
    elif damage == "short tokens":
        tokens_file(shards, "train").write_bytes(b"\0\0")
    elif damage == "no ends":
        ends.unlink()
    else:
        ends.write_bytes(ends.read_bytes()[:-8])
    assert prepare(text_config(tmp_path, path=str(tmp_path / "a.jsonl"))) == shards
    assert "damaged token cache is built again" in caplog.text
    assert read_all(shards, load_tokenizer("bytes")) == sorted(texts)


def test_processes_can_prepare_at_once(tmp_path):
    texts = make_texts(3000)
    write_jsonl(tmp_path / "a.jsonl", texts)
    config = text_config(tmp_path, path=str(tmp_path / "a.jsonl"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        first, second = pool.map(prepare, [config, config])
    assert first == second
    assert {file.name for file in first.parent.iterdir()} == {first.name, f"{first.name}.lock"}
    assert read_all(first, load_tokenizer("bytes")) == sorted(texts)


# Errors


@pytest.fixture
def in_bad_files(tmp_path, monkeypatch):
    """Work in a folder of files and tokenizers that cannot be used."""
    folder = tmp_path / "bad"
    folder.mkdir()
    contents = {
        "empty.txt": "",
        "blank.jsonl": "\n\n",
        "one.txt": "one document, long enough for a sequence",
        "table.csv": "a,b",
        "broken.jsonl": '{"text": ',
        "number.jsonl": '{"text": 3}',
        "list.jsonl": "[1]",
        "broken.parquet": "no parquet",
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    (folder / "latin.txt").write_bytes("Ärger".encode("latin-1"))
    write_jsonl(folder / "body.jsonl", ["a", "b"], key="body")
    pq.write_table(pa.table({"body": ["a"]}), folder / "body.parquet")
    (folder / "none").mkdir()
    write_tokenizer(folder / "no_eos", eos="<stop>")
    write_tokenizer(folder / "wrong_eos", eos_token="<stop>")
    (folder / "broken").mkdir()
    (folder / "broken" / "tokenizer.json").write_text("{")
    monkeypatch.chdir(folder)


@pytest.mark.usefixtures("in_bad_files")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "data.path=None names no files .* set data.path"),
        ({"path": []}, r"data.path=\[\] names no files .* set data.path"),
        ({"path": "missing.txt"}, "data.path='.*missing.txt' matches no file; check the path"),
        ({"path": "*.none"}, r"data.path='.*\*.none' matches no file"),
        ({"path": "gone://a"}, "data.path='gone://a' cannot be opened.* use a local path"),
        ({"path": "none"}, "data.path='.*' is a folder without .* set data.format"),
        ({"path": "empty.txt"}, "data.path='.*' matches empty files only.* name other files"),
        ({"path": "table.csv"}, "data.format=null .*table.csv.* set data.format=txt"),
        ({"path": "body.jsonl"}, "data.text_key='text' is no field of line 1 .*: body, id"),
        ({"path": "body.parquet"}, "data.text_key='text' is no field of .*: body"),
        ({"path": "list.jsonl"}, "data.text_key='text' is no field .* there is none"),
        ({"path": "number.jsonl"}, "data.text_key='text' holds int .* set data.text_key"),
        ({"path": "broken.jsonl"}, "data.path: line 1 of .* no JSON .* data.format"),
        ({"path": "broken.parquet"}, "data.path: .* no parquet file .* data.format"),
        ({"path": "one.txt", "tokenizer": "gone"}, "data.tokenizer='.*gone'.* use bytes"),
        ({"source": "stdlib", "path": "one.txt"}, "data.path=.*stdlib.* use data=text"),
        ({"source": "stdlib", "format": "txt"}, "data.format='txt' .*data.format=null"),
    ],
)
def test_check_names_key_and_remedy(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check_data(text_config(tmp_path, **changes))
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("in_bad_files")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "latin.txt"}, "data.path: .*latin.txt' is no UTF-8 text .* convert it"),
        ({"path": "blank.jsonl"}, "data.path='.*' holds no text; name files"),
        ({"path": "one.txt"}, "data.seq_len=16 .* data.path needs at least 2 documents, not 1"),
        ({"tokenizer": "no_eos"}, "data.tokenizer='.*' needs an .* names none; put .*eos_token"),
        ({"tokenizer": "wrong_eos"}, "data.tokenizer='.*names '<stop>', which it does not know"),
        ({"tokenizer": "broken"}, "data.tokenizer: .* is no tokenizer.json .* save the tokenizer"),
    ],
)
def test_prepare_names_key_and_remedy(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(text_config(tmp_path, **({"path": "one.txt"} | changes)))
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_too_long_sequences_name_the_length_that_works(tmp_path, shards):
    config = text_config(tmp_path, path=str(tmp_path / "a.jsonl"))
    num_tokens = min(split.num_tokens for split in load_meta(shards).splits.values())
    message = (
        f"data.seq_len={num_tokens} needs .* val split .* data.seq_len={num_tokens - 1} at most"
    )
    with pytest.raises(ValueError, match=message):
        prepare(replace(config, seq_len=num_tokens))
    assert prepare(replace(config, seq_len=num_tokens - 1)) == shards
