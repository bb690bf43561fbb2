"""Windows that keep to documents: what is in them, what is left out, and what is refused."""

import json
import logging
from itertools import pairwise

import numpy as np
import pytest
from helpers.data import load_data_group

from trainer.data import micro_batches, open_data, prepare
from trainer.data.packing import best_fit
from trainer.data.shards import load_ends, load_meta, tokens_file

SEQ_LEN = 32
LENGTHS = [1, 5, 31, 32, 33, 34, 63, 64, 65, 66, 96, 100, 129] * 3


@pytest.fixture
def make_config(tmp_path):
    """Return a function that makes the section; documents have these lengths, and EOS."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh"), size=length)) for length in LENGTHS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    defaults = {"path": str(tmp_path / "a.jsonl"), "cache_dir": str(tmp_path / "cache")}
    defaults |= {"seq_len": SEQ_LEN, "val_fraction": 0.3}
    return lambda **changes: load_data_group("text", **(defaults | changes))


def read_documents(config, split="train"):
    """Return the tokens of each document."""
    folder = prepare(config)
    tokens = np.fromfile(tokens_file(folder, split), load_meta(folder).dtype)
    return [document.tolist() for document in np.split(tokens, load_ends(folder, split))[:-1]]


def read_pieces(config, split="train"):
    """Return, for each window, the inputs and labels of each of its documents."""
    dataset = open_data(config, split, 0)
    windows = []
    for index in range(dataset.num_sequences):
        window = dataset.sequence(index)
        stop = SEQ_LEN - window.num_padding
        assert set(window.labels[stop:].tolist()) <= {-100}
        edges = [0, *(at for at in window.boundaries.tolist() if at < stop), stop]
        pairs = pairwise(edges)
        here = [(window.tokens[a:b].tolist(), window.labels[a:b].tolist()) for a, b in pairs]
        assert (stop in window.boundaries) == (window.num_padding > 0)
        windows.append(here)
    return windows


def cut(document):
    """Return inputs and labels of the pieces of a document, a window each."""
    inputs, labels = document[:-1], document[1:]
    starts = range(0, len(inputs), SEQ_LEN)
    return [(inputs[i : i + SEQ_LEN], labels[i : i + SEQ_LEN]) for i in starts]


@pytest.mark.parametrize("min_doc_tokens", [None, 66, 10, 2])
def test_windows_of_documents_are_inside_long_ones(make_config, min_doc_tokens):
    config = make_config(packing="documents", min_doc_tokens=min_doc_tokens)
    least = min_doc_tokens or SEQ_LEN + 1
    wanted = [
        piece
        for document in read_documents(config)
        if len(document) >= least
        for piece in cut(document)
        if len(piece[0]) == SEQ_LEN or len(piece[0]) >= least - 1
    ]
    assert read_pieces(config) == [[piece] for piece in wanted]
    if min_doc_tokens is None:
        assert all(len(tokens) == SEQ_LEN for tokens, _ in wanted)


@pytest.mark.parametrize("too_long", ["cut", "truncate", "drop"])
def test_domain_packing_keeps_documents_whole(make_config, too_long):
    config = make_config(packing="domain", too_long=too_long)
    pieces = [cut(document) for document in read_documents(config)]
    if too_long == "truncate":
        pieces = [parts[:1] for parts in pieces]
    elif too_long == "drop":
        pieces = [parts for parts in pieces if len(parts) == 1]
    wanted = [piece for parts in pieces for piece in parts]
    windows = read_pieces(config)
    assert sorted(piece for window in windows for piece in window) == sorted(wanted)
    if too_long == "cut":
        num_tokens = sum(len(tokens) for tokens, _ in wanted)
        assert len(windows) == -(-num_tokens // SEQ_LEN), "no window fewer would do"


def test_best_fit_leaves_the_least_room():
    rng = np.random.default_rng(0)
    for seq_len in (1, 7, 50):
        lengths = rng.integers(1, seq_len + 1, size=200)
        window_of = best_fit(lengths, seq_len)
        rooms = []  # by the definition
        for length in sorted(lengths.tolist(), reverse=True):
            fitting = [i for i, room in enumerate(rooms) if room >= length]
            if not fitting:
                rooms.append(seq_len)
                fitting = [len(rooms) - 1]
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        filled = np.bincount(window_of, weights=lengths)
        assert sorted(seq_len - filled) == sorted(rooms)


def test_padding_is_a_document_that_nobody_counts(make_config):
    config = make_config(packing="domain", too_long="drop")
    dataset = open_data(config, "train", 0)
    windows = [dataset.sample(number) for number in range(8)]
    assert any(window.num_padding for window in windows)
    for size in (1, 4):
        batches = micro_batches(
            dataset, 0, global_batch_size=8, micro_batch_size=size, dp_rank=0, dp_size=1
        )
        lengths = [length for batch in batches for length in batch.doc_lengths()]
        assert sum(lengths) == 8 * SEQ_LEN - sum(window.num_padding for window in windows)
        labels = sum(int((batch.labels != -100).sum()) for batch in batches)
        assert labels == sum(lengths), "in whole documents every token predicts the next"
        for batch in batches:
            assert int(batch.cu_seqlens[-1]) == size * SEQ_LEN


def test_windows_are_made_once_for_each_way_of_cutting(make_config, caplog):
    caplog.set_level(logging.INFO, "trainer.data")
    ways = [{"packing": "documents"}, {"packing": "domain"}]
    ways += [ways[0] | {"min_doc_tokens": 66}, ways[1] | {"too_long": "drop"}]
    made = [read_pieces(make_config(**way)) for way in ways]
    assert caplog.text.count("% full") == len(ways)
    assert [read_pieces(make_config(**way)) for way in ways] == made
    assert caplog.text.count("% full") == len(ways)
    files = list(prepare(make_config()).glob("*windows*"))
    assert len(files) == len(ways), "and none that is only half written"
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    assert [read_pieces(make_config(**way)) for way in ways] == made
    assert caplog.text.count("damaged windows are made again") == len(ways)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"packing": "documents", "seq_len": 130},
            "documents of 131 tokens or more and the longest of the train split has 130; use "
            "data.min_doc_tokens=130, or data.seq_len=129 without it, or data.packing=domain",
        ),
        (
            {"packing": "documents", "min_doc_tokens": 1000},
            "documents of 1000 tokens or more and the longest .* has 130; use",
        ),
        ({"packing": "domain", "too_long": "drop", "seq_len": 1}, "at most 2 tokens in the val"),
    ],
)
def test_data_without_a_window_say_what_would_work(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        open_data(make_config(**changes), "train", 0)
    if changes == {"packing": "documents", "seq_len": 130}:
        longest = [
            max(map(len, read_documents(make_config(), split))) for split in ("train", "val")
        ]
        works = make_config(packing="documents", seq_len=min(longest) - 1)
        assert open_data(works, "train", 0).num_sequences
