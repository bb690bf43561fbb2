"""Whole runs with experts and stages: every rank sends the bytes of the formulas, and no others."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import run_ranks, tiny

SEQ_LEN, BATCH, STEPS = 91, 4, 3
MODEL = (
    "model=tiny_moe", "model.num_layers=4", "model.hidden_size=48",
    "model.ffns.dense.intermediate_size=64",
    "model.ffns.moe.intermediate_size=8", "model.num_sinks=5",
    *(f"model.mixers.{mixer}.{key}" for mixer in ("linear", "window", "full")
      for key in ("num_heads=6", "num_kv_heads=2", "head_dim=8")),
    "model.mixers.window.window_size=30", f"data.seq_len={SEQ_LEN}",
    f"data.global_batch_size={BATCH}", "data.micro_batch_size=1", f"run.steps={STEPS}",
    "evaluation.max_sequences=3", "evaluation.every=2", "optim.schedule=constant",
)  # fmt: skip
"""Four layers, three of them with eight experts, and sequences that no number of ranks divides."""

DISPATCH = {"ep dispatch moe", "ep combine moe"}
COUNTED = DISPATCH | {"ep counts moe"}
SUMMED, SHARED = "dp all_reduce gradients", "dp all_gather_into_tensor parameters"
EXPERTS = {"edp all_reduce gradients", "edp all_gather_into_tensor parameters"}
STAGES = {"pp send activations", "pp send gradients", "pp all_reduce gradients"}
UNFORESEEN = {"metrics", "scalars", "record"}
"""A few bytes each, which no tensor of the model has a share in."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bytes")


def train(folder: Path, num_ranks: int, *overrides: str) -> Path:
    """Run the ranks to their end and return the run directory."""
    run_dir = folder / "-".join(overrides).replace("=", "")
    arguments = tiny(folder, *MODEL, *overrides, f"run.dir={run_dir}")
    arguments = [a for a in arguments if "gate_rank" not in a]  # these gates are the keys
    run_ranks(arguments, folder, faults=(None,) * num_ranks)
    return run_dir


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("num_ranks", "overrides", "expected"),
    [
        pytest.param(
            4, ("parallel.ep=2", "parallel.zero_stage=1"),
            COUNTED | EXPERTS | {SUMMED, SHARED}, id="ep2-dp4-zero1",
        ),
        pytest.param(
            2, ("parallel.ep=2", "parallel.ulysses=2", "parallel.zero_stage=2",
                "parallel.recompute=full", "dtype=bfloat16"),
            COUNTED | {SUMMED, SHARED}, id="ep2-ulysses2-zero2-recompute-bf16",
        ),
        pytest.param(
            2, ("parallel.ep=2", "parallel.ring=2", "model.ffns.moe.moe.capacity=1.0",
                "parallel.moe_recompute=layer"),
            DISPATCH | {SUMMED}, id="ep2-ring2-aligned-recompute",
        ),
        pytest.param(
            4, ("parallel.pp=2", "parallel.zero_stage=1"),
            STAGES | {SUMMED, SHARED}, id="pp2-dp2-zero1",
        ),
        pytest.param(
            4, ("parallel.pp=2", "parallel.ep=2", "parallel.ring=2", "parallel.hot_experts=2",
                "model.ffns.moe.moe.balance_loss=0.0"),
            COUNTED | STAGES | {SUMMED, "ep expert_copy moe"}, id="pp2-ep2-ring2-hot",
        ),
    ],
)  # fmt: skip
def test_runs_send_what_the_formulas_say(
    folder: Path, num_ranks: int, overrides: tuple[str, ...], expected: set[str]
) -> None:
    run_dir = train(folder, num_ranks, *overrides)
    uses = {
        f"{axis} {collective} {kind}": use
        for axis, collectives in read(run_dir / "comm.json").items()
        for collective, whole in collectives.items()
        for kind, use in whole.get("by_kind", {}).items()
        if kind not in UNFORESEEN
    }
    for name in expected:
        assert uses[name]["all_ranks"]["bytes"] > 0, name
    for name, use in uses.items():
        assert use["bytes"] == use["predicted_bytes"], name
        assert use["all_ranks"]["bytes"] == use["all_ranks"]["predicted_bytes"], name
        assert use["all_ranks"]["ranks_off"] == 0, name
    report = read(run_dir / "report.json")
    assert not [row for row in report["communication_table"] if row["as_predicted"] is False]
    for layer in report["routing"]["layers"]:
        assert sum(layer["load"]) == STEPS * BATCH * SEQ_LEN
