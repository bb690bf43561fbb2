"""Copies of hot experts change what is sent and nothing else."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import runs
from helpers.assertions import assert_close
from helpers.ranks import TIMEOUT_SECONDS, run_ranks

from conf.schema import FFNConfig, MoEConfig, OpsConfig, SpikeConfig
from models.moe import MoE
from parallel.comm import Comm
from parallel.hot_experts import HotExperts
from parallel.layout import build_layout
from parallel.ledger import Ledger
from parallel.mesh import World, init_mesh
from parallel.pipeline import ModelPart
from parallel.recompute import Recompute, run_recomputed
from parallel.sequence import SequenceContext

SIZE, INNER, TOKENS, MICRO_BATCHES, LAYER = 16, 24, 41, 3, "layers.0"
COPY = 3 * SIZE * INNER
"""Weights of an expert."""


class Case(NamedTuple):
    """A layer on so many ranks, and the experts that its tokens choose in each step."""

    num_ranks: int
    num_experts: int
    hot: tuple[tuple[int, ...], ...]
    """Of each step; none: what the router likes."""
    top_k: int = 1
    max_copies: int = 8
    level: str = "none"
    """What of the layer runs again in the backward pass."""
    dtype: torch.dtype = torch.float32


def run_steps(world: World, case: Case) -> list[dict[str, Any]]:
    """Return outputs, gradients, bytes and copies of each step on this rank."""
    cpu = torch.device("cpu")
    ledger, ep_size = Ledger(), world.world_size
    comm = Comm(ledger=ledger)
    if ep_size > 1:
        comm = Comm(init_mesh(world, cpu, "gloo", TIMEOUT_SECONDS, ep=ep_size), ledger)
    moe = _build(case, ModelPart(ep_rank=comm.mesh.ep.index, ep_size=ep_size))
    hot_experts = HotExperts(
        {LAYER: moe.experts.weights},
        hidden_size=SIZE,
        dtype=case.dtype,
        max_copies=case.max_copies if ep_size > 1 else 0,
        micro_batches=MICRO_BATCHES,
        comm=comm,
    )
    layout = build_layout(torch.tensor([0, TOKENS]), kind="contiguous", sp_rank=0, sp_size=1)
    context = SequenceContext(layout, OpsConfig(), comm, hot_experts=hot_experts).at(layer=LAYER)
    # One rank has the tokens of all.
    ranks = [world.rank] if ep_size > 1 else range(case.num_ranks)
    steps = []
    for i, hot in enumerate(case.hot):
        ledger.entries.clear()
        moe.router.bias.zero_()
        moe.router.bias[list(hot)] = 1e3
        inputs = [_draw(case, i, rank) for rank in ranks]
        drawn = [torch.cat(parts) for parts in zip(*inputs, strict=True)]
        step = _run_step(moe, context, drawn, again=case.level == "layer")
        hot_experts.end_step()
        entries = {name: e.bytes for (axis, name, _), e in ledger.entries.items() if axis == "ep"}
        steps.append({**step, "bytes": entries, "copied": hot_experts.copied[:, 0].nonzero()})
    return steps


def _build(case: Case, part: ModelPart) -> MoE:
    config = MoEConfig(
        num_experts=case.num_experts, top_k=case.top_k, num_shared_experts=1, score="softmax",
        normalize=False, balance_loss=0.0, z_loss=0.0, bias_rate=0.1, capacity=None,
        spiking_router=False,
    )  # fmt: skip
    level = case.level if case.level in ("activation", "experts") else "none"
    above = 20 if case.level == "above" else None
    recompute = Recompute("none", level, above)  # type: ignore[arg-type]
    ffn = FFNConfig(intermediate_size=INNER, moe=config)
    moe = MoE(ffn, SIZE, SpikeConfig(enabled=False, k=3.0), OpsConfig(), part, recompute)
    torch.manual_seed(1)
    moe.reset(0.3, 0.3)
    return moe


def _draw(case: Case, step: int, rank: int) -> list[torch.Tensor]:
    """Return inputs and gradients of outputs of a rank, as 2 * MICRO_BATCHES tensors."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    shape = (2 * MICRO_BATCHES, TOKENS, SIZE)
    return list(torch.randn(shape, generator=generator).to(case.dtype))


def _run_step(
    moe: MoE, context: SequenceContext, drawn: list[torch.Tensor], *, again: bool
) -> dict[str, Any]:
    """Run the micro batches in the order of 1F1B: a second forward pass before the first back."""
    moe.zero_grad(set_to_none=True)
    inputs = [x[None].requires_grad_() for x in drawn[:MICRO_BATCHES]]
    outs: list[torch.Tensor] = []
    for i in range(MICRO_BATCHES + 1):
        if i < MICRO_BATCHES:
            outs.append(run_recomputed(moe, inputs[i], context, when=again))
        if i:
            outs[i - 1].backward(drawn[MICRO_BATCHES + i - 1][None])
    return {
        "out": [out.detach()[0] for out in outs],
        "dx": [x.grad[0] for x in inputs if x.grad is not None],
        "gradients": {name: p.grad for name, p in moe.named_parameters()},
    }


CASES = {
    # No copy is made before a load has lasted for two steps. Once it moves on, copies are there for
    # one more step, in which no row comes to them.
    "P2-G4-all-to-one": (
        Case(2, 4, ((3,), (3,), (3,), (0,), ())),
        [[], [], [(0, 3)], [(0, 3)], []],
    ),
    "P2-G8-each-lends-and-borrows": (
        Case(2, 8, ((1, 6),) * 3, top_k=2, level="layer"),
        [[], [], [(0, 6), (1, 1)]],
    ),
    "P4-G4-one-for-all-others": (
        Case(4, 4, ((2,),) * 4, level="experts"),
        [[], [], *[[(0, 2), (1, 2), (3, 2)]] * 2],
    ),
    "P4-G8-two-of-which-one": (
        Case(4, 8, ((5, 1),) * 3, top_k=2, max_copies=1, level="above"),
        [[], [], [(0, 5), (1, 1), (2, 1), (3, 1)]],
    ),
    "P2-G4-balanced": (Case(2, 4, ((),) * 3, level="activation"), [[]] * 3),
    "P2-G4-jumps": (Case(2, 4, ((0,), (3,), (0,), (3,))), [[]] * 4),
    "P2-G4-bf16": (Case(2, 4, ((0,),) * 3, dtype=torch.bfloat16), [[], [], [(1, 0)]]),
    "P2-G4-off": (Case(2, 4, ((0,),) * 3, max_copies=0), [[]] * 3),
}


@pytest.mark.parametrize(("case", "copied"), CASES.values(), ids=CASES)
def test_copies_change_no_number(case: Case, copied: list[list[tuple[int, int]]]) -> None:
    expected = run_steps(World(0, 1, 0), case)
    actual = run_ranks(case.num_ranks, run_steps, case)
    for rank in actual:
        assert [list(map(tuple, step["copied"].tolist())) for step in rank] == copied
    for i, step in enumerate(expected):
        ranks = [rank[i] for rank in actual]
        for key in ("out", "dx"):
            for j, whole in enumerate(step[key]):
                parts = torch.cat([rank[key][j] for rank in ranks])
                assert_close(f"{key} of step {i}, micro batch {j}", parts, whole, case.dtype)
        for name, gradient in step["gradients"].items():
            parts = torch.stack([rank["gradients"][name] for rank in ranks])
            whole = parts.flatten(0, 1) if name.startswith("experts.") else parts.sum(0)
            assert_close(f"gradient of {name} in step {i}", whole, gradient, case.dtype)


def test_bytes_of_copies_replace_those_of_rows() -> None:
    case = Case(4, 8, ((3,),) * 3)
    rows = 2 * MICRO_BATCHES * TOKENS * SIZE * 4
    ranks = run_ranks(case.num_ranks, run_steps, case)
    before, after = ([rank[i]["bytes"] for rank in ranks] for i in (1, 2))
    assert [sent["dispatch"] for sent in before] == [rows, 0, rows, rows]
    assert [sent["combine"] for sent in before] == [0, 3 * rows, 0, 0]
    assert all("expert_copy" not in sent for sent in before)
    assert [sent["dispatch"] + sent["combine"] for sent in after] == [0] * 4
    # One sends its weights to three and gets a gradient from each.
    assert [sent["expert_copy"] for sent in after] == [4 * COPY, 12 * COPY, 4 * COPY, 4 * COPY]
    busiest = [max(sum(sent.values()) for sent in step) for step in (before, after)]
    assert busiest[0] > 2 * busiest[1]


MIXERS = ("linear", "window", "full")
MODEL = (
    "model=tiny_moe", "model.hidden_size=48", "model.ffns.dense.intermediate_size=64",
    "model.ffns.moe.intermediate_size=32", "model.num_sinks=4", "model.num_layers=4",
    *(f"model.mixers.{mixer}.{key}" for mixer in MIXERS
      for key in ("num_heads=2", "num_kv_heads=1", "head_dim=16")),
    "model.mixers.window.window_size=24", "data.seq_len=96", "data.global_batch_size=8",
    "data.micro_batch_size=1", "evaluation.max_sequences=4", "evaluation.every=3",
)  # fmt: skip
LAYOUTS = [
    (2, "ep=2", "zero_stage=0", "recompute=full"),
    (4, "ep=2", "zero_stage=1", "ulysses=2"),
    (4, "ep=4", "zero_stage=2", "ring=2", "layout=zigzag"),
    (4, "ep=2", "zero_stage=1", "pp=2", "recompute=selective"),
]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank, whose folder takes the others."""
    folder = tmp_path_factory.mktemp("runs")
    runs.run(train(folder, "one"), folder)
    return folder / "one"


def train(folder: Path, name: str, *overrides: str) -> list[str]:
    """Return the arguments of a run in folder/name; initial weights make the load uneven."""
    arguments = runs.tiny(folder, *MODEL, f"run.dir={name}", *overrides)
    return [a for a in arguments if "gate_rank" not in a]  # these gates are the keys


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(num_ranks, layout) for num_ranks, *layout in LAYOUTS],
    ids=["-".join(layout).replace("=", "") for _, *layout in LAYOUTS],
)
def test_run_with_copies_equals_one_rank(one_rank: Path, num_ranks: int, layout: list[str]) -> None:
    folder, name = one_rank.parent, "-".join(layout).replace("=", "")
    overrides = [f"parallel.{override}" for override in (*layout, "hot_experts=4")]
    arguments = train(folder, name, *overrides)
    runs.run_ranks(arguments, folder, faults=(None,) * num_ranks)
    for key in ("loss", "grad_norm", "val_loss", "router_max_load"):
        expected = runs.column(one_rank, key)
        assert runs.column(folder / name, key) == pytest.approx(expected, rel=1e-6), key
    comm = json.loads((folder / name / "comm.json").read_text())
    assert comm["ep"]["expert_copy"]["all_ranks"]["bytes"] > 0
