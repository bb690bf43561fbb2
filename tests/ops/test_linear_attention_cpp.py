"""Linear attention's kernel for the CPU: against the reference, and what it asks of memory."""

from pathlib import Path

import pytest
import torch
from helpers import recurrent
from helpers.assertions import assert_close
from helpers.recurrent import Case, Inputs, to_double

from ops.cpp_build import explain_no_amx
from ops.linear_attention import linear_attention

ABSENCE = explain_no_amx("cpu")
pytestmark = pytest.mark.skipif(bool(ABSENCE), reason=str(ABSENCE))
NAMES = ("q", "k", "v", "log_decay", "initial_state")


CASES = [
    *[Case((T,), decay=decay) for T in (1, 63, 64, 65) for decay in (None, "scalar", "vector")],
    *[Case((65,), decay=f"{size}-{cut}") for size in ("scalar", "vector") for cut in (50, "inf")],
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
    Case((70, 3), H=6, H_state=2, D_v=65, decay="scalar", initial_state=True),
]  # fmt: skip


def make_inputs(case: Case, *, strided: bool = False) -> Inputs:
    return recurrent.make_inputs(case, torch.bfloat16, strided=strided)


def outputs_and_gradients(x: Inputs, impl: str) -> dict[str, torch.Tensor]:
    def compute(y: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        out, final = linear_attention(
            *y[:4],
            initial_state=y.initial_state,
            output_final_state=True,
            cu_seqlens=y.cu_seqlens,
            impl=impl,
        )
        assert final is not None
        return out, final

    return recurrent.outputs_and_gradients(x, compute)


def assert_all_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    recurrent.assert_all_close(actual, expected, torch.bfloat16)


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
    dense = Inputs(*(None if t is None else t.contiguous() for t in x))
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
        half = outputs_and_gradients(Inputs(*tensors, state, None), "cpp")
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


def test_values_of_other_head_dims_are_padded_for_the_kernel() -> None:
    x = make_inputs(Case((70,), D_v=65))
    wide = x._replace(v=torch.nn.functional.pad(x.v, (0, 31)))
    found, expected = (linear_attention(*y[:4], impl="cpp")[0] for y in (x, wide))
    assert torch.equal(found, expected[..., :65])


def test_decay_and_state_of_16_bits_keep_their_dtype_in_gradients() -> None:
    x = make_inputs(Case((70,), initial_state=True))
    x = x.map(torch.Tensor.bfloat16)
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
