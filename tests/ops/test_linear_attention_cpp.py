"""Linear attention's kernel for the CPU: against the reference, and what it asks of memory."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.assertions import assert_close

from ops.cpp_build import explain_no_amx
from ops.linear_attention import linear_attention

ABSENCE = explain_no_amx("cpu")
pytestmark = pytest.mark.skipif(bool(ABSENCE), reason=str(ABSENCE))
NAMES = ("q", "k", "v", "log_decay", "initial_state")


class Case(NamedTuple):
    """One row: documents packed in a row, or the rows of a batch of equally long ones."""

    lengths: tuple[int, ...]
    H: int = 2
    H_state: int = 2
    D: int = 32
    D_v: int | None = None
    decay: str | None = "vector"
    initial_state: bool = False
    packed: bool = True

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths)) if self.packed else f"{len(self.lengths)}x"
        shape = f"T{lengths}-H{self.H}/{self.H_state}-D{self.D}"
        value = f"-Dv{self.D_v}" if self.D_v else ""
        return f"{shape}{value}-{self.decay}{'-state' if self.initial_state else ''}"


CASES = [
    *[Case((T,), decay=decay) for T in (1, 63, 64, 65) for decay in (None, "scalar", "vector")],
    *[Case((65,), decay=f"{size}{cut}") for size in ("scalar", "vector") for cut in (-50, "-inf")],
    Case((128,), decay="vector-inf", initial_state=True),  # cut where a chunk begins
    *[Case((100,), decay=f"{size}-strong", initial_state=True) for size in ("scalar", "vector")],
    Case((100,), decay="vector-channel", initial_state=True),
    Case((100,), decay="scalar-zero", initial_state=True),
    Case((1000,), H=1, H_state=1, D=64, initial_state=True),
    Case((1000,), H=2, H_state=1, decay="vector-strong"),
    Case((513, 3, 600), H=1, H_state=1, decay="scalar-50", initial_state=True),
    Case((63, 63, 63), packed=False, initial_state=True),
    Case((128, 128), packed=False, decay=None),
    Case((1, 70, 1, 0, 28), initial_state=True),
    Case((5, 64, 64, 1), decay=None, initial_state=True),
    Case((3, 70), decay="vector-inf", initial_state=True),
    Case((70,), H=6, H_state=2, initial_state=True),
    Case((70, 2), H=7, H_state=1, decay="scalar", initial_state=True),
    Case((65,), H=9, H_state=9, decay="vector-strong"),
    Case((70,), H=6, H_state=2, D_v=64, decay=None),
    Case((65, 1), H=3, H_state=1, D=64, D_v=32, initial_state=True),
    Case((100,), D=128, initial_state=True),
    Case((40,), H=1, H_state=1, D=256, D_v=224, initial_state=True),
]  # fmt: skip


class Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_decay: torch.Tensor | None
    initial_state: torch.Tensor | None
    cu_seqlens: torch.Tensor | None


def make_inputs(case: Case, *, strided: bool = False) -> Inputs:
    """Draw the inputs of a case, bfloat16; decay and state are float32."""
    B, T = (1, sum(case.lengths)) if case.packed else (len(case.lengths), case.lengths[0])

    def draw(H: int, D: int) -> torch.Tensor:
        if strided:  # heads and tokens swapped in memory, channels a slice of twice as many
            return torch.randn(B, H, T, 2 * D).transpose(1, 2)[..., ::2]
        return torch.randn(B, T, H, D)

    D_v = case.D_v or case.D
    k = draw(case.H_state, case.D) * case.D**-0.5
    q, k, v = (x.bfloat16() for x in (draw(case.H, case.D), k, draw(case.H_state, D_v)))
    state, cu_seqlens = None, None
    if case.initial_state:
        state = torch.randn(len(case.lengths), case.H_state, case.D, D_v)
    if case.packed:
        cu_seqlens = torch.tensor([0, *case.lengths], dtype=torch.int32).cumsum(0).int()
    decay = None if case.decay is None else make_decay(case, draw(case.H_state, case.D))
    return Inputs(q, k, v, decay, state, cu_seqlens)


def make_decay(case: Case, noise: torch.Tensor) -> torch.Tensor:
    """Draw decay of -0.2 to 0 a token (strong: -10 to 0), or cut in mid-sequence, or all cut."""
    size, _, kind = str(case.decay).partition("-")
    decay = (noise if size == "vector" else noise[..., 0]).sigmoid() * -0.2
    if kind == "strong":
        return decay * 50
    if kind == "zero":
        return decay * 0
    if kind == "channel":
        decay[..., 5] = -torch.inf
    if kind in ("50", "inf"):
        decay[:, decay.shape[1] // 2] = -float(kind)
    return decay


def outputs_and_gradients(x: Inputs, impl: str) -> dict[str, torch.Tensor]:
    """Return out, final_state and the gradients of a random function of both."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in x[:5]]
    q, k, v, log_decay, state = leaves
    assert q is not None
    assert k is not None
    assert v is not None
    out, final = linear_attention(
        q,
        k,
        v,
        log_decay,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=x.cu_seqlens,
        impl=impl,
    )
    assert final is not None
    generator = torch.Generator().manual_seed(5)
    douts = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in (out, final)]
    named = {n: t for n, t in zip(NAMES, leaves, strict=True) if t is not None}
    gradients = torch.autograd.grad((out, final), list(named.values()), douts)
    results = {f"d{name}": g for name, g in zip(named, gradients, strict=True)}
    return {"out": out.detach(), "final_state": final.detach()} | results


def to_double(x: Inputs) -> Inputs:
    return Inputs._make([*(None if t is None else t.double() for t in x[:5]), x.cu_seqlens])


def assert_all_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(name, actual[name], expected[name], torch.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_the_reference(case: Case) -> None:
    x = make_inputs(case)
    actual = outputs_and_gradients(x, "cpp")
    assert actual["out"].dtype == torch.bfloat16
    assert actual["final_state"].dtype == torch.float32
    assert_all_close(actual, outputs_and_gradients(to_double(x), "reference"))


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_inputs_need_not_be_contiguous(decay: str) -> None:
    case = Case((70, 3), H=6, H_state=2, decay=decay, initial_state=True)
    x = make_inputs(case, strided=True)
    assert not any(t.is_contiguous() for t in x[:4] if t is not None)
    dense = Inputs._make(None if t is None else t.contiguous() for t in x)
    actual, expected = outputs_and_gradients(x, "cpp"), outputs_and_gradients(dense, "cpp")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", [Case((600, 70), H=3, H_state=3, initial_state=True)], ids=str)
def test_the_number_of_threads_changes_nothing(case: Case) -> None:
    x = make_inputs(case)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = outputs_and_gradients(x, "cpp")
    finally:
        torch.set_num_threads(before)
    one = outputs_and_gradients(x, "cpp")
    assert all(torch.equal(two[name], one[name]) for name in one)


@pytest.mark.parametrize("decay", [None, "scalar", "vector", "vector-strong"])
def test_two_halves_chained_by_the_state_equal_the_whole(decay: str | None) -> None:
    x = make_inputs(Case((100,), H=6, decay=decay, initial_state=True, packed=False))
    whole = outputs_and_gradients(x, "cpp")
    outs, state = [], x.initial_state
    for part in (slice(0, 37), slice(37, 100)):
        tensors = [None if t is None else t[:, part] for t in x[:4]]
        half = outputs_and_gradients(Inputs._make([*tensors, state, None]), "cpp")
        outs.append(half["out"])
        state = half["final_state"]
    chained = {"out": torch.cat(outs, 1), "final_state": state}
    assert_all_close(chained, {name: whole[name] for name in chained})


def test_either_output_alone_has_gradients() -> None:
    x = make_inputs(Case((70,), initial_state=True))
    for index in (0, 1):
        results = []
        for impl, y in (("cpp", x), ("reference", to_double(x))):
            leaves = [t.detach().requires_grad_() for t in y[:5] if t is not None]
            both = linear_attention(
                *leaves[:4], initial_state=leaves[4], output_final_state=True, impl=impl
            )
            output = both[index]
            assert output is not None
            results.append(torch.autograd.grad(output.square().sum(), leaves, allow_unused=True))
        for name, actual, expected in zip(NAMES, *results, strict=True):
            expected = torch.zeros_like(actual) if expected is None else expected
            assert_close(f"d{name}", actual, expected, torch.bfloat16)


@pytest.mark.parametrize("D", [24, 288])
def test_other_head_dims_are_left_to_torch(D: int) -> None:
    x = make_inputs(Case((20,), D=D))
    actual, expected = outputs_and_gradients(x, "cpp"), outputs_and_gradients(x, "torch")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_decay_and_state_of_16_bits_keep_their_dtype_in_gradients() -> None:
    x = make_inputs(Case((70,), initial_state=True))
    x = Inputs._make([*(None if t is None else t.bfloat16() for t in x[:5]), x.cu_seqlens])
    actual = outputs_and_gradients(x, "cpp")
    assert actual["dlog_decay"].dtype == actual["dinitial_state"].dtype == torch.bfloat16
    assert_all_close(actual, outputs_and_gradients(to_double(x), "reference"))


@pytest.mark.parametrize("decay", ["vector", "vector-strong"])
def test_memory_beyond_outputs_and_gradients_is_less_than_the_inputs(decay: str) -> None:
    x = make_inputs(Case((32768,), H=2, decay=decay, D=64))
    outputs_and_gradients(make_inputs(Case((64,), D=64)), "cpp")
    inputs = sum(t.nbytes for t in x[:4] if t is not None)
    leaves = [t.requires_grad_() for t in x[:4] if t is not None]
    dout = torch.zeros_like(x.v)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = read_memory("VmRSS")
    out, _ = linear_attention(*leaves, impl="cpp")
    gradients = torch.autograd.grad(out, leaves, dout)
    results = out.nbytes + sum(t.nbytes for t in gradients)
    assert read_memory("VmHWM") - before - results < inputs


def read_memory(name: str) -> int:
    """Return bytes of memory of this process, as the system counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
