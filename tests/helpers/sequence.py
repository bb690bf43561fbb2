"""Token mixing over one sequence: inputs, the result on the ranks that share it, the definition."""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from helpers.ranks import Setting, build_context, run_ranks

from conf.schema import OpsConfig
from ops.attention import attention as attention_op
from ops.delta_rule import delta_rule as delta_rule_op
from ops.linear_attention import linear_attention as linear_attention_op
from ops.short_conv import short_conv as short_conv_op
from parallel.layout import build_layout
from parallel.ledger import Ledger
from parallel.mesh import World
from parallel.recompute import run_recomputed
from parallel.sequence import (
    SequenceContext,
    attention,
    delta_rule,
    linear_attention,
    short_conv,
)

WEIGHTS = ("weight", "bias")
"""Inputs that every rank has whole; the others have a row for each token."""
D, D_V, CHANNELS = 8, 5, 6


@dataclass(frozen=True)
class Problem:
    """What is computed, whoever holds the tokens."""

    mixer: Literal["full", "window", "linear", "delta", "conv"]
    documents: tuple[int, ...] = (101,)
    sinks: int = 0
    heads: tuple[int, int] = (6, 2)
    """Of queries, and of keys and values or states."""
    size: int = 7
    """Tokens of the window or taps of the convolution."""
    decay: str = "none"
    """none, scalar or vector; scalar-50 and vector-inf cut some tokens off from those before."""
    dtype: torch.dtype = torch.float64
    factor: float = 1.0
    """On the queries: with large scores a query sees next to nothing of all keys but one."""
    loss: tuple[int, int] | None = None
    """Tokens [start, stop) that the loss depends on, sinks aside; None: all."""

    def __str__(self) -> str:
        details = {
            "full": f"H{self.heads[0]}/{self.heads[1]}",
            "window": f"H{self.heads[0]}/{self.heads[1]}-W{self.size}",
            "conv": f"K{self.size}",
        }.get(self.mixer, f"H{self.heads[0]}/{self.heads[1]}-{self.decay}")
        documents = "+".join(map(str, self.documents))
        return f"{self.mixer}-{details}-T{documents}-sinks{self.sinks}"


class Options(NamedTuple):
    """How it is computed."""

    impl: str = "auto"
    sync: str = "none"
    recompute: bool = False
    wanted: tuple[str, ...] | None = None
    """Inputs whose gradient is asked for; None: all."""


class Part(NamedTuple):
    """What one rank has computed."""

    results: dict[str, torch.Tensor]
    """out, and d<name> for each input."""
    ledgers: tuple[Ledger, Ledger]
    """Of the forward and of the backward pass."""


def make_inputs(problem: Problem) -> dict[str, torch.Tensor]:
    """Draw the inputs by name and the gradient `dout`, with the rows of the sinks in front."""
    num_rows, (H, H_kv) = problem.sinks + sum(problem.documents), problem.heads
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if problem.mixer == "conv":
        inputs = {"x": draw(1, num_rows, CHANNELS), "weight": draw(CHANNELS, problem.size)}
        inputs |= {"bias": draw(CHANNELS), "dout": draw(1, num_rows, CHANNELS)}
    else:
        q, k = draw(1, num_rows, H, D) * problem.factor, draw(1, num_rows, H_kv, D)
        D_v = D_V if problem.mixer in ("linear", "delta") else D
        inputs = {"q": q, "k": k, "v": draw(1, num_rows, H_kv, D_v)}
        inputs["dout"] = draw(1, num_rows, H, D_v)
    if problem.mixer == "delta":
        inputs["k"] = k / k.norm(dim=-1, keepdim=True)
        inputs["beta"] = draw(1, num_rows, H_kv).sigmoid()
    inputs = {name: x.to(problem.dtype) for name, x in inputs.items()}
    if problem.loss is not None:
        tokens = inputs["dout"][:, problem.sinks :]
        tokens[:, : problem.loss[0]] = 0
        tokens[:, problem.loss[1] :] = 0
    if problem.decay != "none":
        size, _, cut = problem.decay.partition("-")
        decay = -0.2 * draw(1, num_rows, H_kv, *([D] if size == "vector" else [])).abs()
        if cut:
            decay[:, problem.sinks + 10 :: 35] = -float(cut)
        inputs["log_decay"] = decay.to(torch.promote_types(problem.dtype, torch.float32))
    return inputs


@functools.cache
def define(problem: Problem) -> dict[str, torch.Tensor]:
    """Return out and all gradients by the definitions, float64: documents one after another, each
    with the sinks in front of it."""
    leaves = {
        name: x.double().requires_grad_(name != "dout") for name, x in make_inputs(problem).items()
    }
    dout = leaves.pop("dout")
    weights = {name: leaves.pop(name) for name in WEIGHTS if name in leaves}
    S, outs = problem.sinks, []
    for start, stop in itertools.pairwise(itertools.accumulate(problem.documents, initial=S)):
        rows = {n: torch.cat([x[:, :S], x[:, start:stop]], dim=1) for n, x in leaves.items()}
        out = _define_document(problem, rows | weights)
        outs += [out[:, S:]] if outs else [out]
    out = torch.cat(outs, dim=1)
    inputs = leaves | weights
    gradients = torch.autograd.grad(out, list(inputs.values()), dout)
    # Nothing but rounding is left where a query sees one key alone.
    gradients = tuple(x.masked_fill(x.abs() < 1e-13, 0) for x in gradients)
    names = (f"d{name}" for name in inputs)
    return {"out": out.detach()} | dict(zip(names, gradients, strict=True))


def _define_document(problem: Problem, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if problem.mixer == "conv":
        conv = (x["x"], x["weight"], x["bias"])
        return short_conv_op(*conv, activation="silu", impl="reference")[0]
    q, k, v, decay = x["q"], x["k"], x["v"], x.get("log_decay")
    if problem.mixer == "linear":
        return linear_attention_op(q, k, v, decay, impl="reference")[0]
    if problem.mixer == "delta":
        return delta_rule_op(q, k, v, x["beta"], decay, impl="reference")[0]
    window = problem.size if problem.mixer == "window" else None
    sees = {"window_size": window, "num_sinks": problem.sinks}
    return attention_op(q, k, v, **sees, impl="reference")[0]  # type: ignore[arg-type]


DEFAULT = Options()


def compute(
    problem: Problem, setting: Setting, options: Options = DEFAULT
) -> tuple[dict[str, torch.Tensor], list[Part]]:
    """Return what the ranks of a setting compute together, and the part of each."""
    if setting.num_ranks == 1:
        parts = [compute_part(World(0, 1, 0), problem, setting, options)]
    else:
        parts = run_ranks(setting.num_ranks, compute_part, problem, setting, options)
    return _join(problem, setting, [part.results for part in parts]), parts


def compute_part(world: World, problem: Problem, setting: Setting, options: Options) -> Part:
    """Compute one rank's tokens, forward and backward."""
    pins = dict.fromkeys(OpsConfig.__dataclass_fields__, options.impl)
    context = build_context(
        world,
        setting,
        _cu_seqlens(problem),
        num_sinks=problem.sinks,
        ops=OpsConfig(**pins),  # type: ignore[arg-type]
        sync=options.sync,
    )
    S, layout = problem.sinks, context.layout
    inputs = {
        name: x if name in WEIGHTS else torch.cat([x[:, :S], layout.shard(x[:, S:])], dim=1)
        for name, x in make_inputs(problem).items()
    }
    dout = inputs.pop("dout").clone()
    if layout.sp_rank:
        dout[:, :S] = 0  # the sinks are in the loss once
    for name, x in inputs.items():
        inputs[name] = x.clone().requires_grad_(options.wanted is None or name in options.wanted)
    if options.recompute:
        context = context.remembering()
        first = next(iter(inputs))

        def run(x: torch.Tensor) -> torch.Tensor:
            return _mix(problem, inputs | {first: x}, context)

        out = run_recomputed(run, inputs[first], memory=context.memory)
    else:
        out = _mix(problem, inputs, context)
    ledger = context.comm.ledger
    forward = Ledger(dict(ledger.entries))
    ledger.entries.clear()
    out.backward(dout)
    gradients = {f"d{name}": x.grad for name, x in inputs.items() if x.grad is not None}
    return Part({"out": out.detach()} | gradients, (forward, ledger))


def _mix(problem: Problem, x: Mapping[str, torch.Tensor], context: SequenceContext) -> torch.Tensor:
    if problem.mixer == "conv":
        return short_conv(x["x"], x["weight"], x["bias"], context, activation="silu")
    q, k, v, decay = x["q"], x["k"], x["v"], x.get("log_decay")
    if problem.mixer == "linear":
        return linear_attention(q, k, v, decay, context)[0]
    if problem.mixer == "delta":
        return delta_rule(q, k, v, x["beta"], decay, context)[0]
    window = problem.size if problem.mixer == "window" else None
    return attention(q, k, v, context, window_size=window)


def _join(
    problem: Problem, setting: Setting, parts: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Put the ranks' tokens together and sum the gradients of what all ranks have."""
    layout = build_layout(
        _cu_seqlens(problem),
        kind=setting.layout,  # type: ignore[arg-type]
        sp_size=setting.num_ranks,
        ulysses=setting.ulysses,
    )
    S, joined = problem.sinks, {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name[1:] in WEIGHTS:
            joined[name] = _sum(values)
            continue
        sinks = [x[:, :S] for x in values]
        if name == "out":
            assert all(torch.equal(x, sinks[0]) for x in sinks), "all ranks have the same sinks"
            sinks = sinks[:1]
        joined[name] = torch.cat([_sum(sinks), layout.restore([x[:, S:] for x in values])], dim=1)
    return joined


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).double().sum(0).to(parts[0].dtype)


def _cu_seqlens(problem: Problem) -> torch.Tensor:
    bounds = itertools.accumulate(problem.documents, initial=0)
    return torch.tensor(list(bounds), dtype=torch.int32)
