"""Every rank sends the bytes of the formulas, for every algorithm alone and in whole runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import Setting, build_context, run_ranks
from helpers.runs import run_ranks as run_command
from helpers.runs import tiny

from parallel.cost import SequenceCost, Traffic
from parallel.ledger import Ledger
from parallel.mesh import World
from parallel.sequence import (
    SequenceContext,
    attention,
    delta_rule,
    linear_attention,
    short_conv,
)

H, H_KV, D_K, D_V, WINDOW, TAPS = 6, 2, 8, 12, 33, 4

Counts = dict[tuple[str, str], int]


def send(name: str, context: SequenceContext) -> torch.Tensor:
    """Run one operator on random inputs of this rank's tokens."""
    rows = context.num_sinks + context.layout.num_tokens

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, rows, *shape).requires_grad_()

    if name == "conv":
        return short_conv(draw(D_K), torch.randn(D_K, TAPS), None, context)
    if name in ("full", "window"):
        size = WINDOW if name == "window" else None
        q, k, v = draw(H, D_K), draw(H_KV, D_K), draw(H_KV, D_K)
        return attention(q, k, v, context, window_size=size)
    q, k, v = draw(H, D_K), draw(H_KV, D_K), draw(H_KV, D_V)
    if name == "dense":
        keys = torch.nn.functional.normalize(k, dim=-1)
        return delta_rule(q, keys, v, draw(H_KV).sigmoid(), None, context)[0]
    shape = {"none": None, "scalar": (H_KV,), "vector": (H_KV, D_K)}[name]
    decay = None if shape is None else torch.nn.functional.logsigmoid(draw(*shape))
    return linear_attention(q, k, v, decay, context)[0]


def predict(name: str, cost: SequenceCost) -> Traffic:
    if name == "conv":
        return cost.short_conv(D_K, TAPS)
    if name in ("full", "window"):
        return cost.attention(H, H_KV, D_K, WINDOW if name == "window" else None)
    return cost.recurrent(H_KV, D_K, D_V, name)  # type: ignore[arg-type]


def count(
    world: World, setting: Setting, lengths: tuple[int, ...], names: tuple[str, ...]
) -> dict[str, list[tuple[Counts, Any]]]:
    """Return for each operator what this rank sent and what was foreseen, by direction."""
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    context = build_context(world, setting, cu, num_sinks=3)
    cost = SequenceCost(context.layout, setting.linear, itemsize=4)  # type: ignore[arg-type]
    results = {}
    for name in names:
        sent = []
        for ledger in (forward := Ledger(), Ledger()):
            comm = dataclasses.replace(context.comm, ledger=ledger)
            out = send(name, dataclasses.replace(context, comm=comm))
            if ledger is not forward:
                out.sum().backward()
            sent.append({key[:2]: entry.bytes for key, entry in ledger.entries.items()})
        backward = {key: num_bytes - sent[0][key] for key, num_bytes in sent[1].items()}
        foreseen = predict(name, cost)
        results[name] = [(sent[0], foreseen.forward), (backward, foreseen.backward)]
    return results


STATES = ("none", "scalar", "vector", "dense")


@pytest.mark.parametrize(
    ("setting", "lengths", "names"),
    [
        (Setting(2, 1), (400,), ("full", "window", "conv", *STATES)),
        (Setting(1, 3, "zigzag"), (20, 50, 1, 30), ("full", "window", "conv", *STATES)),
        (Setting(2, 2, "zigzag", "scan"), (3, 98), ("full", "window", "conv", "vector", "dense")),
        (Setting(4, 1, linear="scan"), (101,), ("full", "window", "vector", "dense")),
        (Setting(1, 8, linear="scan"), (3, 98), ("full", "window", "conv", "vector")),
    ],
    ids=lambda value: value.id if isinstance(value, Setting) else "",
)
def test_operators_send_what_the_formulas_say(
    setting: Setting, lengths: tuple[int, ...], names: tuple[str, ...]
) -> None:
    for rank, results in enumerate(run_ranks(setting.num_ranks, count, setting, lengths, names)):
        for name in names:
            for sent, foreseen in results[name]:
                assert sent, f"{name} recorded nothing"
                assert sent == foreseen, f"{name} on rank {rank}"


HYBRID = (
    "+mixer@model.mixers.full=full_attention", "model.num_layers=4", "model.num_sinks=4",
    "model.layers=[{mixers:[linear],ffn:dense},{mixers:[window],ffn:dense},"
    "{mixers:[full],ffn:dense},{mixers:[linear,window],ffn:dense}]",
    *(
        f"model.mixers.{mixer}.{key}={value}"
        for mixer in ("linear", "window", "full")
        for key, value in (("num_heads", 6), ("num_kv_heads", 2), ("head_dim", 8))
    ),
    "model.mixers.window.window_size=70", "data.seq_len=331", "data.global_batch_size=2",
    "data.micro_batch_size=1", "run.steps=2", "evaluation.max_sequences=2", "evaluation.every=2",
)  # fmt: skip
"""All kinds of layers, on packed documents whose tokens no number of ranks divides."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("communication")


ULYSSES = "ulysses all_to_all full_attention"
RING = "ring ring full_attention"
HALO = "sp halo window_attention"
GATHER = "sp all_gather linear_attention"
SCAN = "sp state_scan linear_attention"
SUMMED, SHARED = "dp all_reduce gradients", "dp all_gather_into_tensor parameters"
BOTH = ("ulysses=2", "ring=2", "layout=zigzag", "linear=scan", "sync=barrier")
SCATTERED = "dp reduce_scatter_tensor gradients"


@pytest.mark.parametrize(
    ("num_ranks", "overrides", "expected"),
    [
        (2, ("ulysses=2", "recompute=full", "zero_stage=1"), {ULYSSES, GATHER, SUMMED, SHARED}),
        (3, ("ring=3", "linear=scan", "recompute=full", "zero_stage=3"), {RING, SCAN, SCATTERED}),
        (4, BOTH, {ULYSSES, RING, SCAN, SUMMED}),
        (4, ("ring=2", "layout=zigzag", "zero_stage=2"), {RING, GATHER, SUMMED, SHARED}),
    ],
    ids=["ulysses-recompute-zero1", "ring-scan-recompute-zero3", "both-zigzag", "dp-zero2"],
)
def test_runs_send_what_the_formulas_say(
    folder: Path, num_ranks: int, overrides: tuple[str, ...], expected: set[str]
) -> None:
    run_dir = folder / "-".join(overrides).replace("=", "")
    parallel = [f"parallel.{override}" for override in overrides]
    dtype = "dtype=bfloat16" if "recompute=full" in overrides else "dtype=float32"
    arguments = tiny(folder, *HYBRID, *parallel, dtype, f"run.dir={run_dir}")
    run_command(arguments, folder, faults=(None,) * num_ranks)
    comm = json.loads((run_dir / "comm.json").read_text())
    uses = {
        f"{axis} {collective} {kind}": use
        for axis, collectives in comm.items()
        for collective, whole in collectives.items()
        for kind, use in whole.get("by_kind", {}).items()
    }
    expected = expected | {HALO}
    for name in expected:
        assert uses[name]["all_ranks"]["bytes"] > 0, name
    for name in expected | {name for name in uses if not name.startswith("dp")}:
        assert name in expected or name.split()[1] == "barrier"
        use = uses[name]
        assert use["calls"] > 0, name
        assert use["bytes"] == use["predicted_bytes"], name
        assert use["all_ranks"]["bytes"] == use["all_ranks"]["predicted_bytes"], name
        assert use["all_ranks"]["ranks_off"] == 0, name
    report = json.loads((run_dir / "report.json").read_text())
    assert not [row for row in report["communication_table"] if row["as_predicted"] is False]
