"""The report: numbers of a hand-made run directory, and a page that stands on its own."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from parallel.ledger import Ledger
from trainer.report import write_report

NUM_STEPS = 30
TOKENS = 1000


def spike_entry(name: str, layer: int) -> dict[str, Any]:
    return {
        "name": name,
        "layer": layer,
        "share_silent": 0.2,
        "mean_spikes": 1.2,
        "sparsity_all": 0.6,
        "sparsity_within_7": 0.65,
        "share_within_7": 0.94,
        "share_above_16": 0.01,
        "histogram": [0.2, 0.2, *[0.09] * 6, *[0.005] * 8, 0.02],
    }


def make_profile() -> dict[str, Any]:
    return {
        "device": {
            "name": "a processor",
            "accelerator": "cpu",
            "dtype": "float32",
            "num_threads": 2,
            "world_size": 1,
            "host_memory_bytes": 2**34,
            "versions": {"torch": "2.13.0"},
        },
        "peak": {
            "measured_flops": 1e11,
            "measured_how": "large matrix product",
            "vendor_flops": 2e11,
            "vendor_source": "data sheet",
        },
        "flops_per_step": {"model": 4e10, "hardware": 5e10},
        "parameters": {"total": 3000, "active": 2000, "by_kind": {"ffn": 3000}},
        "kinds": [
            {"kind": "linear_attention", "seconds_per_step": 0.2, "flops_per_step": 1e10},
            {"kind": "ffn", "seconds_per_step": 0.5, "flops_per_step": 3e10},
            {"kind": "optimizer", "seconds_per_step": 0.3, "flops_per_step": 0.0},
        ],
        "spikes": {
            "k": 3.0,
            "layers": [spike_entry(f"layers.{layer}.ffn.in", layer) for layer in (0, 1)],
            "model": spike_entry("model", -1),
        },
    }


def make_metrics() -> list[dict[str, Any]]:
    """Three slow steps, then 0.8 s to 1.2 s around a median of 1 s; step 13 is skipped."""
    records: list[dict[str, Any]] = []
    for step in range(1, NUM_STEPS + 1):
        seconds = 9.0 if step <= 3 else (0.8, 1.0, 1.2)[step % 3]
        record: dict[str, Any] = {
            "step": step,
            "loss": 5.0 - 0.1 * step,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "num_tokens": TOKENS * step,
            "step_seconds": seconds,
            "tokens_per_second": TOKENS / seconds,
            "mfu": 0.4,
            "hfu": 0.5,
            "peak_memory_bytes": 2**30 + step,
        }
        if step == 13:
            record |= {"loss": None, "skipped": True, "reason": "loss is inf", "step_seconds": 70.0}
        records.append(record)
        if step in (10, 20, 30):
            val_loss = {10: 4.0, 20: 2.5, 30: 3.0}[step]
            records.append({"step": step, "val_loss": val_loss, "val_bits_per_byte": 2 * val_loss})
    return records


def make_comm() -> dict[str, Any]:
    """All kinds of predictions: none, right, wrong here, wrong on another rank."""
    ledger, other = Ledger(steps=NUM_STEPS), Ledger(steps=NUM_STEPS)
    ledger.record("dp", "all_reduce", 61440, 3.0, calls=60)
    for axis, collective, kind, sent, predicted in (
        ("sp", "halo", "window_attention", 3000, (3000, 3000)),
        ("sp", "halo", "linear_attention", 900, (600, 900)),
        ("ring", "ring", "full_attention", 6000, (6000, 9000)),
    ):
        for one, foreseen in zip((ledger, other), predicted, strict=True):
            one.record(axis, collective, sent, 1.5, calls=30, kind=kind)
            one.predict(axis, collective, kind, foreseen)
    return ledger.summary([ledger, other])


def make_run(
    path: Path,
    *,
    metrics: list[dict[str, Any]] | None = None,
    profile: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    comm: dict[str, Any] | None = None,
) -> Path:
    path.mkdir(exist_ok=True)
    default = {"run": {"name": "tiny", "steps": NUM_STEPS}, "spike": {"enabled": True, "k": 3.0}}
    (path / "config.yaml").write_text(yaml.safe_dump(config or default))
    if metrics is not None:
        lines = [json.dumps(record) + "\n" for record in metrics]
        (path / "metrics.jsonl").write_text("".join(lines))
    if profile is not None:
        (path / "profile.json").write_text(json.dumps(profile))
        (path / "comm.json").write_text(json.dumps(comm or make_comm()))
    return path


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report."""
    path = tmp_path_factory.mktemp("full") / "run"
    make_run(path, metrics=make_metrics(), profile=make_profile())
    write_report(path)
    return path


@pytest.fixture(scope="module")
def full_report(full_run: Path) -> dict[str, Any]:
    return json.loads((full_run / "report.json").read_text())


def page_of(run_dir: Path) -> str:
    return (run_dir / "report.html").read_text(encoding="utf-8")


def test_throughput_leaves_out_warm_up_and_skipped_steps(full_report: dict[str, Any]) -> None:
    speed = full_report["throughput"]
    assert speed["num_steps_measured"] == NUM_STEPS - 3 - 1
    assert speed["first_step_measured"] == 4
    assert speed["step_seconds"] == pytest.approx(1.0)
    assert speed["step_seconds_p10"] == pytest.approx(0.8)
    assert speed["step_seconds_p90"] == pytest.approx(1.2)
    assert speed["tokens_per_second"] == pytest.approx(TOKENS)


def test_at_least_two_steps_are_warm_up(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", metrics=make_metrics()[:4], profile=make_profile())
    speed = write_report(run_dir)["throughput"]
    assert (speed["num_steps_measured"], speed["first_step_measured"]) == (2, 3)


def test_utilization_follows_its_definition(full_report: dict[str, Any]) -> None:
    speed = full_report["throughput"]
    assert speed["mfu_measured_peak"] == pytest.approx(0.4)
    assert speed["hfu_measured_peak"] == pytest.approx(0.5)
    assert speed["mfu_vendor_peak"] == pytest.approx(0.2)
    assert "2 x active parameters" in speed["definition"]


def test_no_vendor_peak_gives_no_vendor_utilization(tmp_path: Path) -> None:
    profile = make_profile()
    profile["peak"]["vendor_flops"] = None
    run_dir = make_run(tmp_path / "run", metrics=make_metrics(), profile=profile)
    assert write_report(run_dir)["throughput"]["mfu_vendor_peak"] is None
    assert "only the measured peak means anything" in page_of(run_dir)


def test_time_by_kind_has_shares_and_utilization(full_report: dict[str, Any]) -> None:
    rows = full_report["time_by_kind"]
    assert [row["kind"] for row in rows] == ["ffn", "optimizer", "linear_attention"]
    assert [row["time_share"] for row in rows] == pytest.approx([0.5, 0.3, 0.2])
    assert [row["flops_share"] for row in rows] == pytest.approx([0.75, 0.0, 0.25])
    assert [row["mfu"] for row in rows] == [pytest.approx(0.6), None, pytest.approx(0.5)]


def test_loss_memory_and_run_state(full_report: dict[str, Any]) -> None:
    assert full_report["loss"] == {
        "first": pytest.approx(4.9),
        "last": pytest.approx(2.0),
        "last_val": 3.0,
        "last_val_bits_per_byte": 6.0,
        "best_val": 2.5,
        "best_val_bits_per_byte": 5.0,
        "best_val_step": 20,
    }
    assert full_report["memory"]["peak_bytes"] == 2**30 + NUM_STEPS
    run = full_report["run"]
    assert (run["name"], run["steps_done"], run["finished"]) == ("tiny", NUM_STEPS, True)
    assert run["num_tokens"] == NUM_STEPS * TOKENS
    assert full_report["communication"]["dp"]["all_reduce"]["bytes"] == 61440


def test_communication_stands_beside_its_formulas(
    full_run: Path, full_report: dict[str, Any]
) -> None:
    rows = full_report["communication_table"]
    assert [(row["axis"], row["kind"]) for row in rows] == [
        ("ring", "full_attention"),
        ("sp", "linear_attention"),
        ("sp", "window_attention"),
        ("dp", None),
    ]
    assert [row["as_predicted"] for row in rows] == [False, False, True, None]
    assert [row["deviation"] for row in rows] == [0.0, 0.5, 0.0, None]
    assert [row["bytes_per_step"] for row in rows] == [200, 30, 100, 2048]
    assert [row["predicted_bytes_per_step"] for row in rows] == [200, 20, 100, None]
    assert [row["step_share"] for row in rows] == pytest.approx([0.05, 0.05, 0.05, 0.1])
    assert [row["all_ranks"]["ranks_off"] for row in rows] == [1, 1, 0, None]
    page = page_of(full_run)
    assert "2 of 3</b> rows" in page
    assert page.count('<tr class="off">') == 2
    assert "+50" in page
    assert "ranks: 1" in page


def test_right_formulas_and_a_ledger_without_them(tmp_path: Path) -> None:
    comm = make_comm()
    del comm["ring"], comm["sp"]["halo"]["by_kind"]["linear_attention"]
    run_dir = make_run(tmp_path / "run", profile=make_profile(), comm=comm)
    write_report(run_dir)
    assert "exactly the bytes of the formulas" in page_of(run_dir)
    assert '<tr class="off">' not in page_of(run_dir)
    use = {"calls_per_step": 2.0, "bytes_per_step": 2048.0, "calls": 60, "bytes": 61440}
    make_run(run_dir, profile=make_profile(), comm={"dp": {"all_reduce": use}})
    (row,) = write_report(run_dir)["communication_table"]
    assert (row["bytes"], row["as_predicted"], row["seconds_per_step"]) == (61440, None, None)
    assert "the bytes of the formulas" not in page_of(run_dir)


def test_skipped_steps_are_listed_with_their_reason(
    full_run: Path, full_report: dict[str, Any]
) -> None:
    assert full_report["skipped_steps"] == [{"step": 13, "reason": "loss is inf"}]
    assert "loss is inf" in page_of(full_run)
    assert "skipped step" in page_of(full_run)


def test_spikes_stand_beside_their_references(full_run: Path, full_report: dict[str, Any]) -> None:
    spikes = full_report["spikes"]
    assert spikes["model"]["sparsity_all"] == 0.6
    assert spikes["reference"]["sparsity_3_steps"] == 0.6915
    assert [point["k"] for point in spikes["reference"]["trade_off"]] == [2, 2.5, 3, 3.5, 4]
    normal = next(row for row in spikes["check"] if row["inputs"] == "standard normal")
    assert (normal["k"], normal["mean_spikes"]) == (3, 1.299)
    assert "layers.1.ffn.in" in page_of(full_run)


def routing_entry(layer: int, load: list[float]) -> dict[str, Any]:
    return {
        "name": f"layers.{layer}.ffn.router",
        "layer": layer,
        "load": load,
        "router_max_load": 3.5,
        "router_entropy": 1.25,
        "router_drop_rate": 0.125,
        "balance_loss": 1.75,
        "z_loss": 2.25,
    }


def write_moe_report(path: Path, loads: list[list[float]], drop_rate: float) -> str:
    """Write the report of a run with experts, after which every step has these figures."""
    figures = {"router_max_load": 3.5, "router_entropy": 1.25, "router_drop_rate": drop_rate}
    metrics = [record | figures | {"balance_loss": 1.75} for record in make_metrics()]
    profile = make_profile() | {
        "routing": {
            "layers": [routing_entry(layer, load) for layer, load in enumerate(loads, 1)],
            "busiest_rank_bytes_per_step": 3 * 2**20,
            "busiest_rank_bytes_per_step_without_copies": 7 * 2**20,
            "mean_rank_bytes_per_step": 2**20,
        }
    }
    write_report(make_run(path, metrics=metrics, profile=profile))
    return page_of(path)


def test_routing_shows_every_expert(tmp_path: Path) -> None:
    page = write_moe_report(tmp_path / "run", [[300.0, 100.0, 0.0, 0.0], [5.0, 5.0]], 0.125)
    drawn = page.split("<h2>Routing</h2>")[1].split("<h2>Communication</h2>")[0]
    assert drawn.count("<svg") == 2
    for text in ("layer 1", "layer 2", ">3<", ">0<", ">1<", "Dropped choices"):
        assert text in drawn
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", drawn.split("<tbody>")[1])
    values = ["1", "4", "3.00", "0.00", "3.50", "1.25", "1.75", "2.25"]
    assert cells[:9] == [*values, "12.5\N{NO-BREAK SPACE}%"]
    assert cells[9:13] == ["2", "2", "1.00", "1.00"]
    text = " ".join(drawn.split())
    assert "busiest rank sends 3 MiB per step" in text
    assert "Without copies the busiest rank would have sent 7 MiB" in text
    assert not re.findall(r"(?:fill|stroke): #(?!000000|ffffff)\w{6}", drawn)


def test_routing_without_a_token_or_a_drop_is_drawn_all_the_same(tmp_path: Path) -> None:
    page = write_moe_report(tmp_path / "run", [[0.0] * 40], 0.0)
    assert "Dropped choices" not in page
    assert page.count("<svg") == 9


def test_model_without_experts_has_no_routing(full_run: Path, full_report: dict[str, Any]) -> None:
    assert full_report["routing"] is None
    assert "<h2>Routing</h2>" not in page_of(full_run)


def test_axes_stand_in_the_order_of_their_work(tmp_path: Path) -> None:
    axes = ["ulysses", "ep", "pp", "dp", "edp", "start", "checkpoint"]
    ledger = Ledger(steps=NUM_STEPS)
    for axis in sorted(axes):
        ledger.record(axis, "all_reduce", 60, 3.0, kind="gradients")
    comm = ledger.summary([ledger])
    run_dir = make_run(tmp_path / "run", metrics=make_metrics(), profile=make_profile(), comm=comm)
    rows = write_report(run_dir)["communication_table"]
    assert [row["axis"] for row in rows] == axes
    assert [row["step_share"] for row in rows] == [*[pytest.approx(0.1)] * 5, None, None]


def test_writing_again_changes_nothing_and_leaves_nothing_behind(full_run: Path) -> None:
    names, page = sorted(os.listdir(full_run)), page_of(full_run)
    report = write_report(full_run)
    assert json.loads((full_run / "report.json").read_text()) == report
    assert page_of(full_run) == page
    assert sorted(os.listdir(full_run)) == names
    assert names == [
        "comm.json", "config.yaml", "metrics.jsonl", "profile.json", "report.html", "report.json"
    ]  # fmt: skip


def test_page_stands_on_its_own(full_run: Path) -> None:
    page = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page_of(full_run))
    assert not re.findall(r"https?://|<script|<link|<img|@import|src=", page)
    assert page.count("<svg") == page.count("</svg>") == 7
    assert "not measured yet" not in page
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    for target in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page):
        assert "".join(target) in identifiers


def test_colors_of_the_figures_follow_the_page(full_run: Path) -> None:
    drawn = page_of(full_run).split("</style>", 1)[1]
    assert "var(--blue)" in drawn
    assert not re.findall(r"(?:fill|stroke): #(?!000000|ffffff)\w{6}", drawn)


def test_run_without_a_step_says_not_measured_yet(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    report = write_report(run_dir)
    assert report["run"]["steps_done"] == 0
    assert report["run"]["finished"] is False
    assert report["throughput"]["step_seconds"] is None
    assert report["loss"]["last"] is None
    for section in ("model", "device", "time_by_kind", "communication", "spikes"):
        assert report[section] is None
    assert page_of(run_dir).count("not measured yet") >= 10
    assert "<svg" not in page_of(run_dir)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_unfinished_run_reports_what_there_is(tmp_path: Path, num_steps: int) -> None:
    report = write_report(make_run(tmp_path / "run", metrics=make_metrics()[:num_steps]))
    assert report["run"]["steps_done"] == num_steps
    assert report["run"]["finished"] is False
    assert report["loss"]["first"] == pytest.approx(4.9)
    assert (report["throughput"]["step_seconds"] is None) == (num_steps <= 2)
    assert "unfinished" in page_of(tmp_path / "run")


def test_model_without_spikes(tmp_path: Path) -> None:
    config = {"run": {"name": "dense", "steps": NUM_STEPS}, "spike": {"enabled": False}}
    profile = make_profile() | {"spikes": None}
    run_dir = make_run(tmp_path / "run", metrics=make_metrics(), profile=profile, config=config)
    assert write_report(run_dir)["spikes"] is None
    assert "Spiking is off in this run." in page_of(run_dir)
    assert "Spike sparsity" not in page_of(run_dir)


def test_a_repeated_step_counts_once_and_a_line_cut_off_is_ignored(tmp_path: Path) -> None:
    records = make_metrics()
    run_dir = make_run(tmp_path / "run", metrics=[*records, records[0] | {"loss": 7.0}])
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    report = write_report(run_dir)
    assert report["run"]["steps_done"] == NUM_STEPS
    assert report["loss"]["first"] == 7.0


def test_run_continued_from_another_directory_is_finished_at_its_last_step(tmp_path: Path) -> None:
    report = write_report(make_run(tmp_path / "run", metrics=make_metrics()[-2:]))
    assert (report["run"]["steps_done"], report["run"]["finished"]) == (NUM_STEPS, True)


def test_losses_that_are_no_numbers_do_not_spoil_the_report(tmp_path: Path) -> None:
    records = make_metrics()
    records[5] |= {"loss": float("nan"), "grad_norm": float("inf")}
    run_dir = make_run(tmp_path / "run", metrics=records, profile=make_profile())
    write_report(run_dir)
    assert "NaN" not in (run_dir / "report.json").read_text()


def test_long_run_gives_a_small_page(tmp_path: Path) -> None:
    record = make_metrics()[3]
    metrics = [record | {"step": step, "loss": 2 + 9 / step} for step in range(1, 20001)]
    run_dir = make_run(tmp_path / "run", metrics=metrics)
    write_report(run_dir)
    assert (run_dir / "report.html").stat().st_size < 500_000
    assert "starts at 11" in page_of(run_dir)


def test_hostile_strings_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> $\\frac{1$"
    config = {"run": {"name": evil, "steps": NUM_STEPS}, "data": {"path": evil}}
    profile = make_profile()
    profile["device"]["name"] = profile["kinds"][0]["kind"] = evil
    profile["spikes"]["layers"][0]["name"] = evil
    metrics = make_metrics()
    metrics[4] |= {"skipped": True, "reason": evil}
    run_dir = make_run(tmp_path / "run", metrics=metrics, profile=profile, config=config)
    write_report(run_dir)
    assert "<script" not in page_of(run_dir)
    assert page_of(run_dir).count("&lt;script&gt;") >= 6


def test_folder_that_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run directory: it has no config\.yaml"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="is no run directory"):
        write_report(tmp_path / "missing")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "other: 1\n", "has no section `run`"),
        ("config.yaml", "- a\n", "has no section `run`"),
        ("config.yaml", "a: !!python/object:os.system {}\n", "is no valid YAML"),
        ("metrics.jsonl", '{"step": 1}\n{"ste\n{"step": 3}\n', "line 2 is no valid JSON"),
        ("metrics.jsonl", '{"loss": 1}\n', "line 1 has no step"),
        ("profile.json", "[]", "holds no JSON object"),
    ],
    ids=["no-run", "no-mapping", "yaml-tag", "broken-line", "no-step", "no-object"],
)
def test_unreadable_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    run_dir = make_run(tmp_path / "run")
    (run_dir / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(name) + ".*" + re.escape(message)):
        write_report(run_dir)
