"""Linear attention and the delta rule in all shapes and decays: inputs, outputs and gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from helpers.assertions import assert_close


@dataclass(frozen=True)
class Case:
    """One row: documents packed in a row, or the rows of a batch of equally long ones."""

    lengths: tuple[int, ...]
    H: int = 2
    H_state: int = 2
    D: int = 32
    D_v: int | None = None
    decay: str | None = "vector"
    """None, or scalar or vector, and how (see `make_decay`): "vector-strong"."""
    initial_state: bool = False
    packed: bool = True
    max_beta: float | None = None
    """Of the delta rule, whose keys are normalized; None: linear attention."""

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths)) if self.packed else f"{len(self.lengths)}x"
        shape = f"T{lengths}-H{self.H}/{self.H_state}-D{self.D}"
        value = f"-Dv{self.D_v}" if self.D_v else ""
        beta = f"-beta{self.max_beta:g}" if self.max_beta else ""
        return f"{shape}{value}-{self.decay}{beta}{'-state' if self.initial_state else ''}"


class Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_decay: torch.Tensor | None
    initial_state: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    beta: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Inputs":
        """Apply a function to all tensors but the documents' bounds."""
        kept = {name: t for name, t in self._asdict().items() if t is None or name == "cu_seqlens"}
        return Inputs(**{n: t if n in kept else function(t) for n, t in self._asdict().items()})


Compute = Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]]
"""Returns out and the final states."""


def make_inputs(case: Case, dtype: torch.dtype = torch.float64, *, strided: bool = False) -> Inputs:
    """Draw the inputs of a case, rounded to `dtype`; decay and state stay in the state's dtype."""
    B, T = (1, sum(case.lengths)) if case.packed else (len(case.lengths), case.lengths[0])
    wide = torch.promote_types(dtype, torch.float32)

    def draw(H: int, D: int) -> torch.Tensor:
        if strided:  # heads and tokens swapped in memory, channels a slice of twice as many
            return torch.randn(B, H, T, 2 * D).transpose(1, 2)[..., ::2]
        return torch.randn(B, T, H, D)

    q, k = draw(case.H, case.D).to(dtype), draw(case.H_state, case.D)
    scale = case.D**-0.5 if case.max_beta is None else 1 / k.norm(dim=-1, keepdim=True)
    k, v = (k * scale).to(dtype), draw(case.H_state, case.D_v or case.D).to(dtype)
    beta = state = cu_seqlens = None
    if case.max_beta is not None:
        beta = (torch.rand(B, case.H_state, T).transpose(1, 2) * case.max_beta).to(dtype)
    if case.initial_state:
        state = torch.randn(len(case.lengths), case.H_state, case.D, v.shape[-1], dtype=wide)
    if case.packed:
        cu_seqlens = torch.tensor([0, *case.lengths], dtype=torch.int32).cumsum(0).int()
    decay = None if case.decay is None else make_decay(case, B, T).to(wide)
    if strided and decay is not None:
        decay = decay.transpose(1, 2).contiguous().transpose(1, 2)
    return Inputs(q, k, v, decay, state, cu_seqlens, beta)


def make_decay(case: Case, B: int, T: int) -> torch.Tensor:
    """Draw decay of -0.2 to 0 a token (strong: -10 to 0, stronger: -20 to 0), or none of it (zero).

    It is cut at the first token (start), in mid-sequence (50 by exp(-50), inf), or in one channel
    at every token (channel).
    """
    size, _, kind = str(case.decay).partition("-")
    shape = (B, T, case.H_state) if size == "scalar" else (B, T, case.H_state, case.D)
    decay = torch.rand(shape) * {"strong": -10.0, "stronger": -20.0, "zero": -0.0}.get(kind, -0.2)
    if kind in ("50", "inf"):
        decay[:, T // 2] = -float(kind)
    if kind == "start":
        decay[:, 0] = -torch.inf
    if kind == "channel":
        decay[..., 5] = -torch.inf
    return decay


def outputs_and_gradients(x: Inputs, compute: Compute) -> dict[str, torch.Tensor]:
    """Return out, final_state and the gradients of a random function of both."""
    y = x.map(lambda t: t.detach().requires_grad_())
    leaves = {n: t for n, t in y._asdict().items() if t is not None and t.requires_grad}
    out, final = compute(y)
    generator = torch.Generator().manual_seed(5)
    douts = [torch.randn(t.shape, generator=generator).to(x.q.dtype).to(t) for t in (out, final)]
    gradients = torch.autograd.grad((out, final), list(leaves.values()), douts)
    results = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "final_state": final.detach()} | results


def to_double(x: Inputs) -> Inputs:
    """Return the same numbers for the reference."""
    return x.map(torch.Tensor.double)


def assert_all_close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Compare by name what `outputs_and_gradients` returned."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(name, actual[name], expected[name], dtype)
