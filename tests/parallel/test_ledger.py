"""The ledger adds up calls, bytes and seconds, and holds them beside what was predicted."""

import json

from parallel.ledger import Ledger


def make_ledger(halo_bytes: int = 60) -> Ledger:
    ledger = Ledger(steps=2)
    for _ in range(4):
        ledger.record("sp", "halo", halo_bytes, 0.5, kind="window_attention")
        ledger.predict("sp", "halo", "window_attention", 60)
    ledger.record("sp", "halo", 8, 0.25, kind="linear_attention")
    ledger.predict("sp", "halo", "linear_attention", 8)
    ledger.record("dp", "all_reduce", 100, 1.0, calls=3, kind="gradients")
    ledger.predict("dp", "all_reduce", "gradients", 100)
    ledger.record("dp", "all_reduce", 5, kind="metrics")
    ledger.record("checkpoint", "all_reduce", 7)
    return ledger


def test_summary_has_the_whole_and_every_kind_per_step() -> None:
    ledger = make_ledger()
    assert ledger.seconds() == 3.25
    summary = json.loads(json.dumps(ledger.summary()))
    halo = summary["sp"]["halo"]
    assert (halo["calls"], halo["bytes"], halo["predicted_bytes"]) == (5, 248, 248)
    assert (halo["calls_per_step"], halo["bytes_per_step"]) == (2.5, 124)
    assert halo["by_kind"]["window_attention"] == {
        "calls_per_step": 2,
        "bytes_per_step": 120,
        "predicted_bytes_per_step": 120,
        "seconds_per_step": 1.0,
        "calls": 4,
        "bytes": 240,
        "predicted_bytes": 240,
    }
    assert "by_kind" not in summary["checkpoint"]["all_reduce"]


def test_whole_has_no_prediction_where_a_part_has_none() -> None:
    entry = make_ledger().summary()["dp"]["all_reduce"]
    assert (entry["bytes"], entry["predicted_bytes"]) == (105, None)
    assert entry["by_kind"]["gradients"]["predicted_bytes"] == 100


def test_summary_of_all_ranks_tells_who_strays() -> None:
    ledgers = [make_ledger(), make_ledger(halo_bytes=90)]
    halo = ledgers[0].summary(ledgers)["sp"]["halo"]
    assert halo["bytes"] == 248
    window = halo["by_kind"]["window_attention"]["all_ranks"]
    assert (window["bytes"], window["predicted_bytes"], window["ranks_off"]) == (600, 480, 1)
    assert (window["bytes_per_step"], window["most_bytes_per_step"]) == (300, 180)
    assert window["most_seconds_per_step"] == 1.0
    assert halo["by_kind"]["linear_attention"]["all_ranks"]["ranks_off"] == 0
    assert halo["all_ranks"]["ranks_off"] == 1
    only_here = Ledger(steps=2)
    assert make_ledger().summary([make_ledger(), only_here])["sp"]["halo"]["all_ranks"] == {
        "bytes_per_step": 124,
        "most_bytes_per_step": 124,
        "most_seconds_per_step": 1.125,
        "bytes": 248,
        "predicted_bytes": 248,
        "ranks_off": 0,
    }


def test_summary_shows_what_another_rank_alone_has_sent() -> None:
    first, last = Ledger(steps=2), Ledger(steps=2)
    last.record("pp", "send", 64, kind="gradients")
    last.record("pp", "send", 4, kind="scalars")
    last.predict("pp", "send", "gradients", 60)
    kinds = first.summary([first, last])["pp"]["send"]["by_kind"]
    gradients, scalars = kinds["gradients"], kinds["scalars"]
    assert (gradients["bytes"], gradients["predicted_bytes"]) == (0, 0)
    assert (gradients["all_ranks"]["bytes"], gradients["all_ranks"]["ranks_off"]) == (64, 1)
    assert (scalars["bytes"], scalars["predicted_bytes"]) == (0, None)
    assert (last.bytes_on("pp"), last.bytes_on("ep")) == (68, 0)


def test_a_dump_is_the_ledger() -> None:
    ledger = make_ledger()
    assert Ledger.load(ledger.dump()) == ledger
