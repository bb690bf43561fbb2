"""rms_norm against its definition, and the definition against torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F
from helpers.assertions import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.cpp_build import explain_no_avx512
from ops.rms_norm import rms_norm
from ops.triton_runtime import trying

CPP_ABSENCE = explain_no_avx512("cpu")
CPP_MARK = pytest.mark.skipif(CPP_ABSENCE is not None, reason=str(CPP_ABSENCE))
IMPLEMENTATIONS = ["torch", "triton", pytest.param("cpp", marks=CPP_MARK)]
CASES = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    ("triton", torch.float32),
    ("triton", torch.bfloat16),
    ("triton", torch.float16),
    pytest.param("cpp", torch.bfloat16, marks=CPP_MARK),
]
SMALL = {"BLOCK_R": 2, "BLOCK_E": 32, "num_warps": 4, "num_stages": 1}

each_case = pytest.mark.parametrize(("impl", "dtype"), CASES, ids=str)


def run(
    impl: str, inputs: dict[str, torch.Tensor], douts: tuple[torch.Tensor, ...]
) -> dict[str, torch.Tensor]:
    """Return outputs and gradients by name."""
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    x, weight, residual = inputs["x"], inputs["weight"], inputs.get("residual")
    if residual is None:
        results = {"out": rms_norm(x, weight, 1e-6, impl=impl)}
    else:
        outs = rms_norm(x, weight, 1e-6, residual=residual, impl=impl)
        results = dict(zip(("out", "summed"), outs, strict=True))
    assert {out.dtype for out in results.values()} == {x.dtype}
    outs, douts = list(results.values()), douts[: len(results)]
    grads = torch.autograd.grad(outs, list(inputs.values()), douts)
    return results | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def compare(
    impl: str, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None
) -> None:
    """Hold outputs and every gradient of an implementation against the reference in float64."""
    inputs = {"x": x, "weight": weight} | ({} if residual is None else {"residual": residual})
    douts = tuple(torch.randn(x.shape).to(x.dtype) for _ in range(2))
    actual = run(impl, inputs, douts)
    wide = {name: t.double() for name, t in inputs.items()}
    expected = run("reference", wide, tuple(t.double() for t in douts))
    for name in actual:
        # The gradient of a single channel, which the norm makes constant, is rounding.
        if x.shape[-1] > 1 or name in ("out", "summed", "dweight"):
            assert_close(f"{impl} {name}", actual[name], expected[name], x.dtype)


def test_reference_is_the_norm_of_pytorch():
    x, weight = torch.randn(3, 7, 33, dtype=torch.float64), torch.randn(33, dtype=torch.float64)
    expected = F.rms_norm(x, (33,), weight, 1e-6)
    assert_close("out", rms_norm(x, weight, 1e-6, impl="reference"), expected, torch.float64)
    out, summed = rms_norm(x - 1, weight, 1e-6, residual=torch.ones_like(x), impl="reference")
    assert_close("out of sum", out, expected, torch.float64)
    assert_close("sum", summed, x, torch.float64)


@each_case
@pytest.mark.parametrize("shape", [(1, 1), (5, 3, 64), (1, 257, 9)], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_implementations_equal_the_reference(impl, dtype, shape, size):
    x = (torch.randn(shape) * min(size, torch.finfo(dtype).max / 8)).to(dtype)
    compare(impl, x, torch.randn(shape[-1]).to(torch.promote_types(dtype, torch.float32)))


@each_case
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    weight_dtype=st.sampled_from([torch.float32, None]),
    rows=st.lists(st.integers(1, 7), min_size=1, max_size=2),
    size=st.sampled_from([32, 64, 256]) | st.integers(2, 300),
    adds=st.booleans(),
    transposed=st.booleans(),
)
def test_sums_shapes_and_strides(impl, dtype, weight_dtype, rows, size, adds, transposed):
    x, residual = torch.randn(2, *rows, size).to(dtype).unbind(0)
    if transposed:  # the same shape on other strides
        x, residual = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, residual))
    weight_dtype = dtype if dtype == torch.float64 else weight_dtype or dtype
    compare(impl, x, torch.randn(size).to(weight_dtype), residual if adds else None)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_thousand_rows(impl):
    x, residual = torch.randn(2, 1000, 32).bfloat16().unbind(0)
    compare(impl, x, torch.randn(32), residual)


@pytest.mark.parametrize("adds", [False, True], ids=["alone", "residual"])
def test_kernels_walk_wide_rows(adds):
    x, residual = torch.randn(2, 7, 100).unbind(0)
    forward = trying("rms_norm", "rms_norm_fwd", 128, SMALL)
    backward = trying("rms_norm", "rms_norm_bwd", 128, SMALL)
    with forward, backward:
        compare("triton", x, torch.randn(100), residual if adds else None)


@pytest.mark.parametrize("size", [20, 40])
def test_kernels_share_rows_among_few_programs(size, monkeypatch):
    monkeypatch.setattr("ops.rms_norm.triton_impl.MAX_PROGRAMS", 2)
    with trying("rms_norm", "rms_norm_bwd", 64, SMALL):
        compare("triton", torch.randn(11, size), torch.randn(size))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_may_go_unused(impl, used):
    x, residual, dout = torch.randn(3, 4, 32).bfloat16().unbind(0)
    grads = []
    for name, dtype in ((impl, torch.bfloat16), ("reference", torch.float64)):
        inputs = [t.to(dtype).requires_grad_() for t in (x, residual)]
        out = rms_norm(inputs[0], torch.ones(32), 1e-6, residual=inputs[1], impl=name)[used]
        grads.append(torch.autograd.grad(out, inputs, dout.to(dtype)))
    for actual, expected in zip(*grads, strict=True):
        assert_close("dx", actual, expected, torch.bfloat16)


def test_weight_and_residual_must_fit():
    with pytest.raises(ValueError, match=r"weight \(4,\) must be \[E\]"):
        rms_norm(torch.randn(2, 5), torch.ones(4), 1e-6)
    with pytest.raises(ValueError, match=r"residual \(5,\) torch.float32 must be as x \(2, 5\)"):
        rms_norm(torch.randn(2, 5), torch.ones(5), 1e-6, residual=torch.ones(5))
