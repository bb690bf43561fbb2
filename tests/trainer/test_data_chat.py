"""Conversations: what is rendered, which tokens are learned, and what is refused."""

import json
import logging
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from helpers.data import load_data_group

from trainer.data import check_data, load_tokenizer, open_data, prepare
from trainer.data.chat import CHATML, ChatEncoder
from trainer.data.shards import load_meta

ROLES = {"u": "user", "a": "assistant", "s": "system"}
# As SmolLM2 and Qwen2 have it: no marks around answers, and a system prompt of its own.
PLAIN_CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{% if not loop.index0 is even %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
NO_END += "{% if add_generation_prompt %}assistant: {% endif %}"
# As Qwen3 has it: what was answered before is rendered in another way.
FORGETFUL = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}"
    "{{ m['content'] if loop.last else m['content'][:1] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def talk(*turns):
    """Messages from turns such as "u:hello"."""
    return [{"role": ROLES[turn[0]], "content": turn[2:]} for turn in turns]


def write_tokenizer(folder, template=None):
    """A byte-level tokenizer that knows the tokens of ChatML, and <s> and </s>."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {character: i for i, character in enumerate(sorted(alphabet))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>", "</s>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>" if template != LLAMA2 else "</s>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def learned_texts(encoder, encoded):
    """The text of each run of tokens that are learned."""
    edges = np.flatnonzero(np.diff(np.r_[0, encoded.is_learned, 0]))
    runs = [encoded.ids[a:b] for a, b in edges.reshape(-1, 2)]
    inner = getattr(encoder.tokenizer, "_tokenizer", None)
    if inner is None:
        return [encoder.tokenizer.decode(run) for run in runs]
    return [inner.decode(run.tolist(), skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["Grüße 🧠<|im_end|>", " two\n<|im_end|>"]),
        (PLAIN_CHATML, ["Grüße 🧠<|im_end|>", " two\n<|im_end|>"]),
        (LLAMA2, [" Grüße 🧠 </s>", "  two\n </s>"]),
        (NO_END, ["Grüße 🧠\n\n", " two\n\n\n"]),
    ],
    ids=["marked", "chatml", "llama2", "no-end"],
)
def test_answers_and_the_ends_of_their_turns_are_learned(tmp_path, kind, template, answers):
    if kind == "bytes":
        (tmp_path / "t.jinja").write_text(template.replace("bos_token", "'<s>'"))
        text = (tmp_path / "t.jinja").read_text().replace("eos_token", "'</s>'")
        (tmp_path / "t.jinja").write_text(text)
        name, file = "bytes", str(tmp_path / "t.jinja")
        if template == PLAIN_CHATML:  # to bytes, no character after an answer is the template's
            answers = [f"{answer}\n" for answer in answers]
    else:
        name, file = write_tokenizer(tmp_path / "t", template), None
    tokenizer = load_tokenizer(name)
    encoder = ChatEncoder(tokenizer, name, file)
    messages = talk("u:Hä?", "a:Grüße 🧠", "u:assistant\n", "a: two\n", "u:and?")
    text, _ = encoder.render(messages)
    encoded = encoder.encode(messages)
    assert learned_texts(encoder, encoded) == answers
    assert encoded.ids.tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    assert encoded.num_bytes == len("Grüße 🧠 two\n".encode())
    assert "Hä?" in text
    assert text.count("and?") == 1


def test_template_of_the_tokenizer_is_what_transformers_renders(tmp_path):
    from transformers import PreTrainedTokenizerFast

    name = write_tokenizer(tmp_path / "t", PLAIN_CHATML)
    theirs = PreTrainedTokenizerFast.from_pretrained(name)
    messages = talk("u:one", "a:two words", "u:three", "a:four")
    encoded = ChatEncoder(load_tokenizer(name), name, None).encode(messages)
    expected = theirs.apply_chat_template(messages, return_dict=False)
    assert encoded.ids.tolist() == [*expected, load_tokenizer(name).eos_id]
    marked = ChatEncoder(load_tokenizer(name), name, "chatml").encode(messages)
    full = theirs.apply_chat_template(
        messages, chat_template=CHATML, return_dict=True, return_assistant_tokens_mask=True
    )
    assert marked.ids[:-1].tolist() == full["input_ids"]
    assert marked.is_learned[:-1].astype(int).tolist() == full["assistant_masks"]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (FORGETFUL, talk("u:x", "a:long", "u:y", "a:z"), "first 2 messages .*chat_template=chatml"),
        (LLAMA2, talk("u:x", "u:y", "a:z"), "data.chat_template: roles must alternate; .*'y'"),
        ("{% if %}", talk("u:x", "a:y"), "data.chat_template: .*repair the template"),
    ],
)
def test_templates_that_do_not_tell_are_refused(tmp_path, template, messages, message):
    name = write_tokenizer(tmp_path / "t", template)
    with pytest.raises(ValueError, match=message):
        ChatEncoder(load_tokenizer(name), name, None).encode(messages)


CHATS = [
    [*talk("u:" + "q" * (5 + i), "a:" + "r" * (3 * i % 11)), *talk("u:?", "a:end")] * (1 + i % 3)
    for i in range(30)
]


def write_chats(tmp_path, chats=CHATS, **changes):
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    name = str(tmp_path / "t") if (tmp_path / "t").exists() else write_tokenizer(tmp_path / "t")
    defaults = {"path": str(tmp_path / "chats.jsonl"), "tokenizer": name, "seq_len": 64}
    defaults |= {"chat_template": "chatml", "cache_dir": str(tmp_path / "cache")}
    return load_data_group("chat", **(defaults | {"val_fraction": 0.3} | changes))


def test_windows_hold_whole_conversations_whose_answers_are_labels(tmp_path, caplog):
    caplog.set_level(logging.INFO, "trainer.data")
    silent = talk("u:nobody answers")
    config = write_chats(tmp_path, [*CHATS, silent], seq_len=272)
    check_data(config)
    encoder = ChatEncoder(load_tokenizer(config.tokenizer), config.tokenizer, "chatml")
    wanted = {tuple(e.ids[:-1].tolist()): e for e in map(encoder.encode, CHATS)}
    found = []
    for split in ("train", "val"):
        dataset = open_data(config, split, 0)
        for index in range(dataset.num_sequences):
            window = dataset.sequence(index)
            edges = [0, *window.boundaries.tolist(), 272]
            for start, stop in pairwise(edges):
                if start == 272 - window.num_padding:
                    assert set(window.labels[start:]) == {-100}
                    continue
                tokens = tuple(window.tokens[start:stop].tolist())
                encoded = wanted[tokens]
                labels = np.where(encoded.is_learned[1:], encoded.ids[1:], -100)
                assert window.labels[start:stop].tolist() == labels.tolist()
                found.append(tokens)
    assert sorted(found) == sorted(wanted)
    assert "1 without anything to learn left out" in caplog.text
    counts = load_meta(prepare(config)).splits["train"]
    dataset = open_data(config, "train", 0)
    labels = [dataset.sequence(i).labels for i in range(dataset.num_sequences)]
    assert sum((row != -100).sum() for row in labels) == counts.num_labels
    assert dataset.bytes_per_label == counts.num_bytes / counts.num_labels


@pytest.mark.parametrize("too_long", ["truncate", "drop", "cut"])
def test_long_conversations_are_truncated_dropped_or_cut(tmp_path, caplog, too_long):
    caplog.set_level(logging.INFO, "trainer.data")
    hopeless = talk("u:" + "q" * 80, "a:end")
    config = write_chats(tmp_path, [*CHATS, hopeless], too_long=too_long)
    encoder = ChatEncoder(load_tokenizer(config.tokenizer), config.tokenizer, "chatml")
    wanted = []
    for encoded in map(encoder.encode, [*CHATS, hopeless]):
        labels = encoded.ids[1:][encoded.is_learned[1:]]
        if too_long == "truncate":
            labels = encoded.ids[1:65][encoded.is_learned[1:65]]
        elif too_long == "drop" and len(encoded.ids) > 65:
            labels = []
        wanted += list(labels)
    found = []
    for split in ("train", "val"):
        dataset = open_data(config, split, 0)
        rows = [dataset.sequence(i).labels for i in range(dataset.num_sequences)]
        assert all((row != -100).any() for row in rows), "no window without an answer"
        found += [label for row in rows for label in row if label != -100]
    assert sorted(found) == sorted(wanted)
    assert "documents are longer than one" in caplog.text


def test_parquet_and_pairs_of_prompt_and_response(tmp_path):
    pairs = [{"prompt": c[0]["content"], "response": c[1]["content"] + "!"} for c in CHATS]
    config = write_chats(tmp_path, [talk("u:" + p["prompt"], "a:" + p["response"]) for p in pairs])
    folder = prepare(config)
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "pairs.parquet")
    rows = [
        {"chat": [*talk("u:" + p["prompt"]), {**talk("a:" + p["response"])[0], "name": "x"}]}
        for p in pairs
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name, key in (("pairs", "messages"), ("rows", "chat")):
        path = str(tmp_path / f"{name}.parquet")
        other = replace(config, path=path, messages_key=key)
        check_data(other)
        counts = [load_meta(f).splits for f in (prepare(other), folder)]
        totals = [sum(split.num_learned for split in splits.values()) for splits in counts]
        assert totals[0] == totals[1] > 0


@pytest.mark.parametrize(
    ("changes", "record", "message"),
    [
        ({}, {"text": "x"}, "messages_key='messages' is no field of line 1.*prompt and response"),
        ({}, {"messages": [{"role": "user"}]}, "no conversation in line 1.*both strings"),
        ({"chat_template": None}, None, "the tokenizer has no chat template; use .*chatml"),
        ({"chat_template": "gone.jinja"}, None, "data.chat_template='gone.jinja' is no file"),
        ({"format": "txt"}, None, "is text and data.source=chat needs records"),
    ],
)
def test_errors_name_key_and_remedy(tmp_path, changes, record, message):
    config = write_chats(tmp_path, **changes)
    if record is not None:
        (tmp_path / "chats.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        check_data(config)


def test_answers_that_no_window_reaches_are_told(tmp_path):
    chats = [talk("u:" + "q" * (100 + i), "a:end") for i in range(20)]
    with pytest.raises(ValueError, match="cuts every answer of the train split off"):
        open_data(write_chats(tmp_path, chats), "train", 0)
    with pytest.raises(ValueError, match="source=chat; use packing=domain"):
        write_chats(tmp_path, packing="stream")
