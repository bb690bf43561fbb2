"""The suite `sequence`: ranks that it starts itself, bytes beside the formulas."""

from helpers.models import compose_tree

from cluster.accelerators.cpu import ACCELERATOR
from conf.schema import BenchConfig, build
from trainer.bench.sequence import bench_sequence


def test_an_algorithm_sends_what_its_formula_says() -> None:
    size = ("seq_len=250", "ranks=[2]", "dtype=float32", "num_threads=1")
    overrides = ("suite=sequence", "cases='Ulysses|zigzag|scan'", *size)
    config = build(BenchConfig, compose_tree(*overrides, config_name="bench"))
    rows = list(bench_sequence(config, ACCELERATOR, 1.0))
    figures = {(row.case.split(",")[0], row.metric): row for row in rows}
    assert len(figures) == len(rows)
    names = {case for case, _ in figures}
    assert names == {"Ulysses", "ring zigzag", "linear scan", "delta rule scan"}
    for name in names:
        sent = figures[name, "bytes_sent"]
        assert sent.value == sent.peer_value > 0
        for metric in ("saved_bytes", "peak_bytes", "seconds"):
            row = figures[name, metric]
            assert row.value > 0
            assert row.ratio == row.peer_value / row.value
