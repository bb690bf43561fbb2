"""Mixes: shares over any prefix, an order of the number alone, epochs by part, validation."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from helpers.data import load_data_group

from trainer.data import check_data, micro_batches, open_data, validation_batches
from trainer.data.mix import schedule_of

LETTERS = {"web": "a", "books": "b", "code": "c"}
WEIGHTS = {"web": 0.7, "books": 0.2, "code": 0.1}
NUM_DOCUMENTS = {"web": 40, "books": 6, "code": 12}


@pytest.fixture
def config(tmp_path):
    """Three parts whose documents are of one letter each, with a number that tells them apart."""
    rng = np.random.default_rng(0)
    for name, letter in LETTERS.items():
        texts = [
            "".join(f"{i}{letter}{j}." for j in range(rng.integers(5, 15)))
            for i in range(NUM_DOCUMENTS[name])
        ]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    parts = [
        {"name": name, "path": str(tmp_path / f"{name}.jsonl"), "weight": weight}
        for name, weight in WEIGHTS.items()
    ]
    return load_data_group(
        "mix", mix=parts, cache_dir=str(tmp_path / "cache"), seq_len=16, val_fraction=0.3
    )


def part_of(window):
    counts = Counter(chr(token) for token in window.tokens.tolist() if token < 256)
    (name,) = (name for name, letter in LETTERS.items() if counts[letter])
    return name


@pytest.mark.parametrize(
    "weights",
    [(1.0, 1.0), (0.7, 0.2, 0.1), (3.5, 2.25, 1, 0.125, 0.01), (0.999, 0.001), (5,), (1.0,) * 7],
)
def test_shares_are_off_by_less_than_a_sample_over_every_prefix(weights):
    schedule = schedule_of(weights)
    located = [schedule.locate(number) for number in range(3 * len(schedule.part))]
    parts = np.array([part for part, _ in located])
    seen = np.cumsum(np.eye(len(weights))[parts], axis=0)
    shares = np.outer(np.arange(1, len(parts) + 1), weights) / sum(weights)
    assert np.abs(seen - shares).max() < 1
    for part in range(len(weights)):  # none left out, none twice
        indices = [index for of, index in located if of == part]
        assert indices == list(range(len(indices)))
    assert schedule.count(len(schedule.part) + 1) == seen[len(schedule.part)].tolist()


def test_samples_are_mixed_by_weight_and_each_part_is_shuffled_by_its_own_epochs(config):
    dataset = open_data(config, "train", 3)
    names = [part_of(dataset.sample(number)) for number in range(200)]
    for prefix in range(1, 201):
        counts = Counter(names[:prefix])
        assert all(abs(counts[name] - prefix * share) < 1 for name, share in WEIGHTS.items())
    windows = {name: [] for name in WEIGHTS}
    for number, name in enumerate(names):
        windows[name].append(dataset.sample(number).tokens.tolist())
    only = replace(config.mix[1], weight=1.0)
    alone = open_data(replace(config, mix=[only]), "train", 3)
    assert [alone.sample(i).tokens.tolist() for i in range(40)] == windows["books"]
    size = alone.num_sequences
    assert 1 < size < 20
    epochs = [windows["books"][i : i + size] for i in range(0, 40 - size, size)]
    assert all(sorted(a) == sorted(b) and a != b for a, b in pairwise(epochs))
    assert dataset.seen(200)[1] == f"books 640 tokens, {40 / size:.3g} epochs"


def test_mixed_batches_do_not_depend_on_ranks_or_on_where_the_run_stopped(config):
    dataset = open_data(config, "train", 3)
    wanted = [dataset.sample(number).tokens.tolist() for number in range(16, 24)]
    for size, ranks in ((8, 1), (1, 4), (2, 2)):
        reopened = open_data(config, "train", 3)
        steps = [
            micro_batches(
                reopened,
                16,
                global_batch_size=8,
                micro_batch_size=size,
                dp_rank=rank,
                dp_size=ranks,
            )
            for rank in range(ranks)
        ]
        rows = [batch.tokens.view(-1, 16).tolist() for step in steps for batch in step]
        assert [row for batch in rows for row in batch] == wanted


@pytest.mark.parametrize("named", [None, "code"])
def test_validation_is_by_weight_or_of_the_part_that_is_named(config, named):
    dataset = open_data(replace(config, validation=named), "val", 3)
    count = dataset.num_sequences
    names = Counter(part_of(dataset.spread(i, count)) for i in range(count))
    if named:
        assert names == {named: count}
    else:
        assert all(abs(names[name] - share * count) < 1 for name, share in WEIGHTS.items())
    tokens = [
        tuple(row)
        for batch in validation_batches(dataset, 10**6, 2, 0, 1)
        for row in batch.tokens.view(-1, 16).tolist()
        if any(row)
    ]
    assert len(tokens) == len(set(tokens)) == count, "no window twice"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "text"}, "source=text with a mix of 1 parts; use data.source=mix"),
        ({"mix": None}, "source=mix with mix=null"),
        ({"mix": []}, "it needs one or more"),
        ({"path": "a.txt"}, "path='a.txt' beside a mix.*use null"),
        ({"validation": "news"}, "validation='news' is no part; use one of .*'web'"),
        ({"mix": [{"name": "chats", "source": "chat", "weight": 1}]}, "give it packing: domain"),
        ({"mix": [{"name": "a", "weight": 1}] * 2}, r"named \['a', 'a'\]; .* all different"),
    ],
)
def test_impossible_sections_are_refused(changes, message):
    mix = [{"name": "web", "weight": 1.0}]
    with pytest.raises(ValueError, match=message):
        load_data_group("mix", **({"mix": mix} | changes))


def test_errors_of_a_part_name_it(config):
    broken = [config.mix[0], replace(config.mix[1], path="gone.txt")]
    with pytest.raises(
        ValueError, match=r"data.mix, part 'books': data.path='gone.txt' matches no"
    ):
        check_data(replace(config, mix=broken))
    uneven = [replace(config.mix[0], weight=0.1234567), config.mix[1]]
    with pytest.raises(
        ValueError, match=r"repeat after .*use weights of fewer digits.*\[382.0, 61"
    ):
        check_data(replace(config, mix=uneven))
