"""The kernel of grouped products for the CPU: exact where rounding has no part in the result."""

from collections.abc import Iterator

import pytest
import torch
from helpers.assertions import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.cpp_build import explain_no_amx
from ops.moe import IMPLEMENTATIONS, grouped_matmul, permute, route, unpermute
from ops.registry import explain

ABSENCE = explain_no_amx("cpu")
pytestmark = pytest.mark.skipif(bool(ABSENCE), reason=str(ABSENCE))
NAMES = ("out", "dx", "dweight")


def draw(*shape: int) -> torch.Tensor:
    """Return -1, 0 and 1: sums of up to 256 of their products are exact in bfloat16."""
    return torch.randint(-1, 2, shape).bfloat16()


def run(
    x: torch.Tensor, weight: torch.Tensor, dout: torch.Tensor, counts: list[int], impl: str
) -> tuple[torch.Tensor, ...]:
    """Return out, dx and dweight."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    out = grouped_matmul(*leaves, torch.tensor(counts), impl=impl)
    return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def check(counts: list[int], F: int, E: int) -> None:
    inputs = draw(sum(counts), E), draw(len(counts), F, E), draw(sum(counts), F)
    actual = run(*inputs, counts, "cpp")
    expected = run(*(t.double() for t in inputs), counts, "reference")
    for name, mine, exact in zip(NAMES, actual, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert exact.numel() == 0 or exact.abs().max() <= 256
        assert_close(name, mine, exact, torch.float64)


@pytest.mark.parametrize(
    ("counts", "F", "E"),
    [
        pytest.param([5, 0, 33, 64, 1, 100, 17], 96, 160, id="uneven"),
        pytest.param([0, 0, 31, 0], 32, 32, id="most-empty"),
        pytest.param([0, 0], 64, 32, id="all-empty"),
        pytest.param([1], 32, 1024, id="a-row"),
        pytest.param([256, 32], 512, 256, id="whole-blocks"),
        # One more than the rows of a task, than its columns and than what is summed at a time.
        pytest.param([257, 2, 511], 544, 288, id="cut-rows"),
        pytest.param([40, 0, 3], 1056, 544, id="cut-columns"),
        pytest.param([7, 60], 40, 72, id="other-sizes"),
    ],
)
def test_products_are_exact(counts: list[int], F: int, E: int) -> None:
    check(counts, F, E)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=5),
    st.sampled_from((32, 64, 96)),
    st.sampled_from((32, 64, 96)),
)
def test_groups_of_any_size_are_multiplied(counts: list[int], F: int, E: int) -> None:
    check(counts, F, E)


def test_sums_are_rounded_once() -> None:
    counts = [300, 20]
    inputs = [torch.randn(shape).bfloat16() for shape in ((320, 544), (2, 544, 544), (320, 544))]
    exact = run(*(t.double() for t in inputs), counts, "reference")
    for name, mine, wide in zip(NAMES, run(*inputs, counts, "cpp"), exact, strict=True):
        # Half a unit in the last of 8 places at most: no partial sum was rounded.
        error = (mine.double() - wide).abs() / wide.abs().clamp_min(1e-2)
        assert error.max() < 2**-8, name


def test_groups_do_not_touch_each_other() -> None:
    counts = [33, 31, 40]
    inputs = [draw(104, 64), draw(3, 64, 64), draw(104, 64)]
    before = run(*inputs, counts, "cpp")
    for t in inputs:
        t[33:64] = float("nan")
        t[1 if len(t) == 3 else slice(0)] = float("nan")
    after = run(*inputs, counts, "cpp")
    for name, first, second in zip(NAMES, before, after, strict=True):
        kept = [0, 2] if name == "dweight" else [*range(33), *range(64, 104)]
        assert torch.equal(first[kept], second[kept]), name


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_do_not_change_a_bit(threads: None) -> None:
    inputs = [torch.randn(shape).bfloat16() for shape in ((320, 96), (3, 544, 96), (320, 544))]
    results = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        results.append(run(*inputs, [290, 0, 30], "cpp"))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_inputs_may_be_strided() -> None:
    inputs = [draw(40, 64), draw(2, 96, 64), draw(40, 96)]
    expected = run(*inputs, [10, 30], "cpp")
    actual = run(*(t.mT.contiguous().mT for t in inputs), [10, 30], "cpp")
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_only_the_asked_gradients_are_made() -> None:
    x, weight, counts = draw(40, 64), draw(2, 96, 64), torch.tensor([10, 30])
    for leaf, other in ((x, weight), (weight, x)):
        leaf.requires_grad_()
        grouped_matmul(x, weight, counts, impl="cpp").sum().backward()  # a gradient of stride 0
        assert leaf.grad is not None
        assert other.grad is None
        leaf.requires_grad_(False)
        leaf.grad = None


def test_the_kernel_is_chosen_for_bfloat16_and_may_be_pinned_around_float32_logits() -> None:
    assert explain("moe", IMPLEMENTATIONS, "cpu", torch.bfloat16)[0] == "cpp"
    assert explain("moe", IMPLEMENTATIONS, "cpu", torch.float32)[0] == "torch"
    weights, experts = route(torch.randn(6, 4), 2, impl="cpp")
    rows, order, counts = permute(draw(6, 32), experts, 4, impl="cpp")
    y = grouped_matmul(rows, draw(4, 32, 32), counts, impl="cpp")
    assert unpermute(y, order, weights, impl="cpp").shape == (6, 32)
