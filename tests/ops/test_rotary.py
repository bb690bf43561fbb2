"""rotary against its definition; angles, relative positions and the inverse."""

import pytest
import torch
from helpers.assertions import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.cpp_build import explain_no_avx512
from ops.rotary import rotary, rotary_table

CPP_ABSENCE = explain_no_avx512("cpu")
CPP_MARK = pytest.mark.skipif(CPP_ABSENCE is not None, reason=str(CPP_ABSENCE))
CASES = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    ("triton", torch.float32),
    ("triton", torch.bfloat16),
    ("triton", torch.float16),
    pytest.param("cpp", torch.bfloat16, marks=CPP_MARK),
]

each_case = pytest.mark.parametrize(("impl", "dtype"), CASES, ids=str)


def compare(impl: str, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Hold output and gradient of an implementation against the reference in float64."""
    dout = torch.randn(x.shape).to(x.dtype)
    results = []
    for name, dtype in ((impl, x.dtype), ("reference", torch.float64)):
        inputs = x.detach().to(dtype).requires_grad_()
        out = rotary(inputs, *table, impl=name)
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out, inputs, dout.to(dtype))])
    for name, actual, expected in zip(("out", "dx"), *results, strict=True):
        assert_close(f"{impl} {name}", actual, expected, x.dtype)


@each_case
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("head_dim", [2, 32, 64, 128])
def test_implementations_equal_the_reference(impl, dtype, heads, head_dim):
    x = torch.randn(2, 9, heads, head_dim).to(dtype)
    compare(impl, x, rotary_table(torch.arange(9) * 1000, head_dim, 1e4))


@each_case
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 63, 64, 65]),
    heads=st.integers(1, 5),
    half=st.sampled_from([16, 32]) | st.integers(1, 40),
    by_heads=st.booleans(),
)
def test_any_shape_on_any_strides(impl, dtype, batch, tokens, heads, half, by_heads):
    x = torch.randn(batch, heads, tokens, 2 * half).to(dtype).transpose(1, 2)
    x = x if by_heads else x.contiguous()
    compare(impl, x, rotary_table(torch.randint(0, 99999, (tokens,)), 2 * half, 1e4))


@each_case
def test_a_thousand_tokens(impl, dtype):
    table = rotary_table(torch.arange(1000), 32, 1e4)
    compare(impl, torch.randn(1, 1000, 1, 32).to(dtype), table)


@each_case
def test_the_gradient_turns_back(impl, dtype):
    x = torch.randn(1, 5, 2, 32).to(dtype).requires_grad_()
    out = rotary(x, *rotary_table(torch.arange(5), 32, 1e4), impl=impl)
    angles = torch.float32 if dtype == torch.float64 else dtype  # those of the table
    assert_close("turned there and back", *torch.autograd.grad(out, x, out), x, angles)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64).unbind(0)
    scores = []
    for shift in (0, 17, 5000):
        tables = (rotary_table(torch.tensor([p + shift]), 64, 1e4) for p in (12, 3))
        a, b = (rotary(x, *table) for x, table in zip((q, k), tables, strict=True))
        scores.append((a * b).sum())
    assert_close("shifted by 17", scores[1], scores[0], torch.float32)
    assert float((scores[2] - scores[0]).abs()) < 1e-2  # float32 angles at position 5,000


def test_pairs_turn_by_position_times_frequency():
    x = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    x[..., 1] = 1.0  # second pair: channels 1 and 3, frequency theta^(-1/2)
    out = rotary(x, *rotary_table(torch.tensor([0, 3]), 4, 100.0))
    angle = torch.tensor(0.3)
    expected = torch.stack([torch.zeros(()), angle.cos(), torch.zeros(()), angle.sin()]).double()
    assert_close("position 3", out[0, 1, 0], expected, torch.float32)
    assert_close("position 0", out[0, 0], x[0, 0], torch.float64)


def test_table_must_fit():
    with pytest.raises(ValueError, match="even D"):
        rotary(torch.randn(1, 4, 2, 8), *rotary_table(torch.arange(5), 8, 1e4))
