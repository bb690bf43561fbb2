"""INT8 products: sums exact in every implementation, for counts of any size and every coding."""

import pytest
import torch

from ops.cpp_build import explain_no_amx
from ops.int8_linear import int8_linear
from ops.spike import encode, spike_count, step_weights
from ops.spike.coding import CODINGS

NO_AMX = pytest.mark.skipif(bool(explain_no_amx("cpu")), reason=str(explain_no_amx("cpu")))
CPP = pytest.param("cpp", marks=NO_AMX)
implementations = pytest.mark.parametrize("impl", ["reference", "torch", CPP, "triton"])


def draw(
    rows: int, size: int, outs: int, largest: int, group_size: int | None = None
) -> tuple[torch.Tensor, ...]:
    """Return count, threshold, weight and scale."""
    count = torch.randint(-largest, largest + 1, (rows, size)).float()
    groups = -(-size // (group_size or size))
    weight = torch.randint(-127, 128, (outs, size), dtype=torch.int8)
    return count, torch.rand(rows, 1), weight, torch.rand(outs, groups)


def expect(
    count: torch.Tensor,
    threshold: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """Return the product, its integer sums made in float64, where they are exact."""
    out = torch.zeros(len(count), len(weight))
    for g, start in enumerate(range(0, count.shape[1], group_size)):
        some = slice(start, start + group_size)
        out += (count[:, some].double() @ weight[:, some].double().T).float() * scale[:, g]
    return out * threshold


@implementations
@pytest.mark.parametrize(
    ("rows", "size", "outs", "largest", "group_size"),
    [
        pytest.param(1, 576, 96, 100, None, id="a-token"),
        pytest.param(16, 64, 32, 127, None, id="one-digit"),
        pytest.param(5, 100, 17, 128, None, id="two-digits-odd-sizes"),
        pytest.param(33, 130, 40, 32639, None, id="most-of-two-digits"),
        pytest.param(3, 70, 40, 32640, None, id="three-digits"),
        pytest.param(2, 3000, 8, 2**22 - 1, None, id="beyond-int32"),
        pytest.param(70, 576, 48, 60, 128, id="groups-the-last-smaller"),
        pytest.param(20, 320, 33, 5000, 64, id="groups-two-digits"),
        pytest.param(3, 40, 8, 60, 16, id="small-groups"),
    ],
)
def test_sums_are_exact(
    impl: str, rows: int, size: int, outs: int, largest: int, group_size: int | None
) -> None:
    inputs = draw(rows, size, outs, largest, group_size)
    inputs[0][0, :2] = torch.tensor([largest, -largest])
    out = int8_linear(*inputs, group_size=group_size, impl=impl)
    assert torch.equal(out, expect(*inputs, group_size or size))


@implementations
def test_a_token_does_not_depend_on_the_others(impl: str) -> None:
    count, threshold, weight, scale = draw(40, 192, 48, 90, 64)
    count[3] *= 500  # three digits, for which its neighbors pay
    together = int8_linear(count, threshold, weight, scale, group_size=64, impl=impl)
    for row in (0, 3, 17):
        some = slice(row, row + 1)
        alone = int8_linear(count[some], threshold[some], weight, scale, group_size=64, impl=impl)
        assert torch.equal(alone, together[some])


@implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32])
def test_dtype_of_counts_does_not_matter(impl: str, dtype: torch.dtype) -> None:
    count, threshold, weight, scale = draw(6, 96, 32, 200)
    inputs = count.view(2, 3, 96), threshold.view(2, 3, 1), weight, scale
    if impl in ("cpp", "triton") and dtype == torch.int32:
        with pytest.raises(ValueError, match="does not take"):
            int8_linear(inputs[0].to(dtype), *inputs[1:], impl=impl)
        return
    out = int8_linear(inputs[0].to(dtype), *inputs[1:], impl=impl)
    assert torch.equal(out, int8_linear(*inputs, impl="reference"))


@implementations
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("group_size", [None, 128])
def test_products_from_trains_are_those_from_counts(
    impl: str, coding: str, group_size: int | None
) -> None:
    _, _, weight, scale = draw(1, 192, 48, 1, group_size)
    count, threshold = spike_count(torch.randn(4, 192))
    if coding in ("binary", "bitwise"):
        count = count.abs()
    train = encode(count, coding)
    rows = train.flatten(0, 1).float()
    ones, unit = torch.ones(len(rows), 1), torch.ones_like(scale)
    # One product per step of the train and group, added up as integers, scaled at the end.
    out = torch.zeros(4, 48)
    for g, start in enumerate(range(0, 192, group_size or 192)):
        some = slice(start, start + (group_size or 192))
        steps = int8_linear(rows[:, some], ones, weight[:, some], unit[:, :1], impl=impl)
        sums = steps.view(len(train), 4, 48).long()
        out += (sums * step_weights(coding, len(train)).view(-1, 1, 1)).sum(0).float() * scale[:, g]
    from_counts = int8_linear(count, threshold, weight, scale, group_size=group_size, impl=impl)
    assert torch.equal(from_counts, out * threshold)


@pytest.mark.parametrize("impl", ["torch", CPP, "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -(2.0**22)])
def test_counts_that_are_no_integers_of_22_bits_are_refused(impl: str, value: float) -> None:
    count, *rest = draw(20, 64, 32, 5)
    count[18, 5] = value
    with pytest.raises(ValueError, match="use a larger threshold"):
        int8_linear(count, *rest, impl=impl)


def test_what_does_not_fit_is_refused() -> None:
    count, threshold, weight, scale = draw(2, 64, 32, 5)
    for inputs, message in (
        ((count, threshold, weight.float(), scale), "int8 \\[out, in\\]"),
        ((count[:, 1:], threshold, weight, scale), "count has shape \\[2, 63\\]"),
        ((count, threshold[0], weight, scale), "threshold is"),
        ((count, threshold, weight, scale[:, 0]), "scale is"),
    ):
        with pytest.raises(ValueError, match=message):
            int8_linear(*inputs)
    with pytest.raises(ValueError, match=r"give float32 \[32, 1\]"):
        int8_linear(count, threshold, weight, scale.repeat(1, 2), group_size=64)


def test_no_tokens_have_no_outputs() -> None:
    count, threshold, weight, scale = draw(0, 64, 32, 5)
    for impl in ("torch", "triton", None):
        assert int8_linear(count, threshold, weight, scale, impl=impl).shape == (0, 32)
