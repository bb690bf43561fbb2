"""swiglu against its definition, and the definition against torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F
from helpers.assertions import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.cpp_build import explain_no_avx512
from ops.swiglu import swiglu

CPP_ABSENCE = explain_no_avx512("cpu")
CPP_MARK = pytest.mark.skipif(CPP_ABSENCE is not None, reason=str(CPP_ABSENCE))
CASES = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    ("torch", torch.float16),
    ("triton", torch.float32),
    ("triton", torch.bfloat16),
    ("triton", torch.float16),
    pytest.param("cpp", torch.bfloat16, marks=CPP_MARK),
]

each_case = pytest.mark.parametrize(("impl", "dtype"), CASES, ids=str)


def compare(impl: str, gate: torch.Tensor, up: torch.Tensor) -> None:
    """Hold output and gradients of an implementation against the reference in float64."""
    dout = torch.randn(gate.shape).to(gate.dtype)
    results = []
    for name, dtype in ((impl, gate.dtype), ("reference", torch.float64)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (gate, up)]
        out = swiglu(*inputs, impl=name)
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out, inputs, dout.to(dtype))])
    for name, actual, expected in zip(("out", "dgate", "dup"), *results, strict=True):
        assert_close(f"{impl} {name}", actual, expected, gate.dtype)


def test_reference_is_silu_times_up():
    gate, up = torch.randn(2, 5, 7, dtype=torch.float64).unbind(0)
    assert_close("out", swiglu(gate, up, impl="reference"), F.silu(gate) * up, torch.float64)


@each_case
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(65, 64)]) | st.lists(st.integers(1, 20), min_size=1, max_size=3),
    size=st.sampled_from([1.0, 20.0]),
    transposed=st.booleans(),
)
def test_implementations_equal_the_reference(impl, dtype, shape, size, transposed):
    gate, up = (torch.randn(2, *shape) * size).to(dtype).unbind(0)
    if transposed:  # the same shape on other strides
        gate = gate.transpose(0, -1).contiguous().transpose(0, -1)
    compare(impl, gate, up)


@each_case
@pytest.mark.filterwarnings("ignore:overflow")
def test_large_gates_pass_or_block(impl, dtype):
    gate = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0, 1.0, 2.0, 3.0] * 2]).to(dtype)
    compare(impl, gate, torch.randn(1, 16).to(dtype))
    out = swiglu(gate, torch.ones(1, 16, dtype=dtype), impl=impl)
    assert out[0, 2:5].tolist() == [0.0, 90.0, 200.0]


@each_case
def test_no_token_gives_no_token(impl, dtype):
    gate, up = (torch.randn(0, 16).to(dtype).requires_grad_() for _ in range(2))
    out = swiglu(gate, up, impl=impl)
    assert out.shape == (0, 16)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (gate, up))] == [(0, 16), (0, 16)]


def test_gate_and_up_must_fit():
    with pytest.raises(ValueError, match=r"up \(2, 4\) torch.float32 must be as gate \(2, 5\)"):
        swiglu(torch.randn(2, 5), torch.randn(2, 4))
