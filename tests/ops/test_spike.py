"""Spike counts, trains, histograms and products: by hand, at extremes, in every implementation."""

import math
from collections import Counter
from unittest import mock

import pytest
import torch
from helpers.assertions import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.cpp_build import explain_no_avx512
from ops.spike import (
    MAX_COUNT,
    decode,
    encode,
    spike_count,
    spike_histogram,
    spike_matmul,
    spike_statistics,
    step_weights,
)
from ops.spike.coding import CODINGS, UNARY

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
UNSUITED = {("cpp", torch.float64), ("triton", torch.float64)}
NO_CPP = pytest.mark.skipif(
    explain_no_avx512("cpu") is not None, reason=explain_no_avx512("cpu") or ""
)
CPP = pytest.param("cpp", marks=NO_CPP)

implementations = pytest.mark.parametrize("impl", ["reference", "torch", CPP, "triton"])
integer_implementations = pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
codings = pytest.mark.parametrize("coding", CODINGS)
implementations_and_dtypes = pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        pytest.param(
            impl, dtype, marks=NO_CPP if impl == "cpp" else (), id=f"{impl}-{str(dtype)[6:]}"
        )
        for impl in ("reference", "torch", "cpp", "triton")
        for dtype in DTYPES
        if (impl, dtype) not in UNSUITED
    ],
)


def dtype_id(value: object) -> str | None:
    return str(value)[6:] if isinstance(value, torch.dtype) else None


def assert_counts(
    count: torch.Tensor, threshold: torch.Tensor, x: torch.Tensor, k: float, impl: str
) -> None:
    """Compare thresholds with float64 ones, and counts bit for bit, given the thresholds."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    expected = (x.double().abs().mean(-1, keepdim=True) / k).clamp(1e-5, 1e4)
    assert threshold.dtype == wide.dtype
    assert_close("threshold", threshold, expected, wide.dtype)
    assert threshold.flatten().tolist() == pytest.approx(expected.flatten().tolist(), rel=2e-6)
    rounded = (wide / threshold).round()
    assert count.dtype == x.dtype
    if impl == "triton" and x.dtype == torch.bfloat16:
        # The interpreter cuts what bfloat16 cannot hold off instead of rounding it.
        assert_close("count", count, rounded, x.dtype)
        few = rounded.abs() <= 256
        assert torch.equal(count[few].float(), rounded[few])
    else:
        assert torch.equal(count, rounded.to(x.dtype))


# Thresholds and counts


def by_hand(row: list[float], k: float) -> tuple[list[int], float]:
    """Return counts and threshold of one token in Python's own arithmetic."""
    threshold = min(max(sum(abs(x) for x in row) / len(row) / k, 1e-5), 1e4)
    return [round(x / threshold) for x in row], threshold


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("k", [0.7, 2.0, 3.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (2, 3, 130)], ids=str)
def test_counts_and_thresholds_follow_the_definition(
    shape: tuple[int, ...], k: float, impl: str
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    count, threshold = spike_count(x, k, impl=impl)
    assert threshold.shape == (*shape[:-1], 1)
    rows = x.flatten(0, -2), count.flatten(0, -2), threshold.flatten()
    for row, counts, limit in zip(*rows, strict=True):
        expected, expected_limit = by_hand(row.tolist(), k)
        assert counts.tolist() == expected
        assert float(limit) == pytest.approx(expected_limit, rel=1e-14)


SHAPES = {"T1-E1": (1, 1), "T63-E15": (63, 15), "T64-E16": (64, 16), "T65-E17": (65, 17)}
SHAPES |= {"B2-T3-E130": (2, 3, 130), "T5-E1000": (5, 1000), "E64": (64,), "T0-E8": (0, 8)}
SHAPES |= {"T2-E5000": (2, 5000), "T1000-E3": (1000, 3)}


@implementations_and_dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_counts_thresholds_and_gradients_of_every_shape(
    shape: tuple[int, ...], dtype: torch.dtype, impl: str
) -> None:
    # Rows of every size, the smallest and the largest beyond the limits of a threshold.
    sizes = torch.logspace(-7, 7, math.prod(shape[:-1]))[torch.randperm(math.prod(shape[:-1]))]
    x = (torch.randn(shape) * sizes.view(*shape[:-1], 1)).to(dtype).requires_grad_()
    count, threshold = spike_count(x, impl=impl)
    assert threshold.shape == (*shape[:-1], 1)
    assert not threshold.requires_grad
    assert_counts(count.detach(), threshold, x.detach(), 3.0, impl)
    dcount = torch.randn(shape).to(dtype)
    (dx,) = torch.autograd.grad(count, x, dcount)
    assert dx.dtype == dtype
    assert_close("dx", dx, dcount.double() / threshold.double(), dtype)


@implementations_and_dtypes
def test_non_contiguous_inputs_and_gradients(dtype: torch.dtype, impl: str) -> None:
    x = torch.randn(6, 40, 5).to(dtype).transpose(1, 2)[..., ::2].requires_grad_()
    count, threshold = spike_count(x, 2.0, impl=impl)
    assert_counts(count.detach(), threshold, x.detach(), 2.0, impl)
    for dcount in (
        torch.ones(()).to(dtype).expand(x.shape),
        torch.randn(20, 5, 6).to(dtype).permute(2, 1, 0),
    ):
        (dx,) = torch.autograd.grad(count, x, dcount, retain_graph=True)
        assert_close("dx", dx, dcount.double() / threshold.double(), dtype)


@implementations
def test_halves_are_rounded_to_even(impl: str) -> None:
    halves = [0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5, 126.5, 127.5, 0.49999997]
    large = [4194302.5, 4194303.5, -4194303.5, 8388609.0, -16777217.0, 1073741824.0]
    for row in (halves, large):
        x = torch.tensor([row])
        count, threshold = spike_count(x, float(x.abs().mean()), impl=impl)
        assert float(threshold) == 1.0
        assert count.tolist() == [[round(value) for value in x[0].tolist()]]


@implementations
def test_threshold_times_count_has_the_gradient_of_the_identity(impl: str) -> None:
    x = torch.randn(5, 33, requires_grad=True)
    count, threshold = spike_count(x, impl=impl)
    (dx,) = torch.autograd.grad((count * threshold).sum(), x)
    assert_close("dx", dx, torch.ones_like(dx), torch.float32)


@implementations_and_dtypes
def test_zeros_are_silent(dtype: torch.dtype, impl: str) -> None:
    x = torch.zeros(2, 8, dtype=dtype, requires_grad=True)
    count, threshold = spike_count(x, impl=impl)
    assert torch.equal(count, torch.zeros_like(x))
    assert threshold.flatten().tolist() == pytest.approx([1e-5] * 2)
    (dx,) = torch.autograd.grad(count.sum(), x)
    assert dx.isfinite().all()


@implementations_and_dtypes
def test_one_huge_channel_silences_the_others(dtype: torch.dtype, impl: str) -> None:
    x = torch.full((1, 300), 0.1, dtype=dtype)
    x[0, 7] = 5000.0
    count, threshold = spike_count(x, impl=impl)
    # The mean is about 5000 / 300, so that the one channel spikes k * 300 times.
    assert float(count[0, 7]) == pytest.approx(900, rel=0.01)
    assert int(count.count_nonzero()) == 1
    assert float(threshold) == pytest.approx((5000 + 299 * 0.1) / 300 / 3, rel=0.01)


@implementations
def test_tiny_values_count_against_the_smallest_threshold(impl: str) -> None:
    count, threshold = spike_count(torch.tensor([[4e-6, -6e-6, 2.4e-5]]), impl=impl)
    assert count.tolist() == [[0.0, -1.0, 2.0]]
    assert float(threshold) == pytest.approx(1e-5)


@implementations_and_dtypes
def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype, impl: str) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[1.0, nan, 2.0], [inf, -inf, 3e5], [inf, nan, 0.0], [1.0, 2.0, 3.0]])
    count, threshold = spike_count(x.to(dtype), impl=impl)
    assert threshold.flatten().tolist() == pytest.approx([nan, 1e4, nan, 2 / 3], nan_ok=True)
    expected = torch.tensor([[nan] * 3, [inf, -inf, 30.0], [nan] * 3, [2.0, 3.0, 4.0]])
    assert torch.allclose(count.float(), expected, rtol=0, atol=0, equal_nan=True)


@NO_CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_threads_and_huge_pages_change_nothing(dtype: torch.dtype) -> None:
    x = torch.randn(1201, 2048).to(dtype)  # of more than two huge pages
    dcount = torch.randn(1201, 2048).to(dtype)
    found = []
    threads = torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        given_x = x.clone().requires_grad_()
        count, threshold = spike_count(given_x, impl="cpp")
        count.backward(dcount)
        assert given_x.grad is not None
        found.append((count, threshold, given_x.grad, spike_histogram(count, impl="cpp")))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert_counts(found[0][0].detach(), found[0][1], x, 3.0, "cpp")


@NO_CPP
def test_quotients_of_the_cpu_kernel_are_those_of_a_division() -> None:
    # Counts of millions: the last bit of a quotient decides how it is rounded.
    x = 1e4 * torch.randn(2000, 99) * torch.exp(torch.randn(2000, 1))
    for k in (3.0, 1e6):
        count, threshold = spike_count(x, k, impl="cpp")
        assert torch.equal(count, (x / threshold).round())


def test_k_must_be_positive() -> None:
    with pytest.raises(ValueError, match="k=0 must be above 0"):
        spike_count(torch.ones(1, 3), 0)


@pytest.mark.parametrize("shape", [(), (2, 0)], ids=str)
def test_a_mean_needs_channels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"give \[\.\.\., channels\], at least one"):
        spike_count(torch.ones(shape))


# Trains

RANGES = {
    # Coding: number of steps, the counts they can hold.
    "binary": (20, range(21)),
    "ternary": (20, range(-20, 21)),
    "bitwise": (8, range(256)),
    "bitwise_bidirectional": (8, range(-255, 256)),
    "bitwise_twos_complement": (8, range(-128, 128)),
}


def spikes_by_hand(count: int, coding: str, num_steps: int) -> list[int]:
    sign = -1 if count < 0 else 1
    if coding in UNARY:
        return [sign] * abs(count) + [0] * (num_steps - abs(count))
    if coding == "bitwise_twos_complement":
        count, sign = count % 2**num_steps, 1
    return [sign * int(bit) for bit in reversed(f"{abs(count):0{num_steps}b}")]


@codings
@integer_implementations
def test_all_counts_in_range_are_inverted_exactly(impl: str, coding: str) -> None:
    num_steps, values = RANGES[coding]
    count = torch.tensor(values)
    train = encode(count, coding, impl=impl)
    assert train.dtype == torch.int8
    assert train.T.tolist() == [spikes_by_hand(value, coding, num_steps) for value in values]
    decoded = decode(train, coding, impl=impl)
    assert decoded.dtype == torch.int64
    assert torch.equal(decoded, count)


@codings
@integer_implementations
def test_more_steps_than_needed_and_every_dtype(impl: str, coding: str) -> None:
    least = 0 if coding in ("binary", "bitwise") else -9
    count = torch.arange(least, 10).view(1, -1, 1).expand(2, -1, 3).transpose(0, 2)
    expected = torch.tensor([spikes_by_hand(n, coding, 11) for n in count.flatten().tolist()])
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int16, torch.int32]
    for dtype in dtypes + ([torch.uint8] if least == 0 else []):
        train = encode(count.to(dtype), coding, num_steps=11, impl=impl)
        assert torch.equal(train.flatten(1).T, expected)
        assert torch.equal(decode(train, coding, impl=impl), count)


@integer_implementations
@pytest.mark.parametrize("coding", CODINGS[2:])
def test_bitwise_codings_hold_counts_below_2_to_62(coding: str, impl: str) -> None:
    largest = 2**62 - 1
    values = [0, 1, largest, largest - 1, 2**31, 2**32 - 1]
    values += [] if coding == "bitwise" else [-value for value in values]
    train = encode(torch.tensor(values), coding, impl=impl)
    assert len(train) == (63 if coding == "bitwise_twos_complement" else 62)
    assert decode(train, coding, impl=impl).tolist() == values


@integer_implementations
@settings(deadline=None, max_examples=15, database=None)
@given(data=st.data())
def test_drawn_counts_are_inverted_exactly(impl: str, data: st.DataObject) -> None:
    coding = data.draw(st.sampled_from(CODINGS))
    most = 30 if coding in UNARY else 2**50
    least = 0 if coding in ("binary", "bitwise") else -most
    values = data.draw(st.lists(st.integers(least, most), max_size=12))
    count = torch.tensor(values, dtype=torch.int64)
    train = encode(count, coding, impl=impl)
    sizes = [abs(value) for value in values] or [0]
    if coding == "bitwise_twos_complement":
        # -2^n needs a bit less than 2^n.
        needed = max((v if v >= 0 else -v - 1).bit_length() + 1 for v in (values or [0]))
    else:
        needed = max(sizes) if coding in UNARY else max(sizes).bit_length()
    assert train.shape == (max(1, needed), len(values))
    assert decode(train, coding, impl=impl).tolist() == values
    weights = step_weights(coding, len(train)).tolist()
    by_steps = [sum(c * s for c, s in zip(weights, one, strict=True)) for one in train.T.tolist()]
    assert by_steps == values


@codings
@integer_implementations
def test_products_of_a_train_add_up_to_the_product_of_its_counts(impl: str, coding: str) -> None:
    least = 0 if coding in ("binary", "bitwise") else -9
    count = torch.randint(least, 10, (3, 40))
    weight = torch.randint(-128, 128, (21, 40), dtype=torch.int8)
    train = encode(count, coding, impl=impl)
    by_steps = spike_matmul(train, weight, impl=impl)
    weights = step_weights(coding, len(train))
    total = (weights.view(-1, 1, 1) * by_steps).sum(0)
    assert torch.equal(total, spike_matmul(count, weight, impl=impl).long())
    assert torch.equal(total, count @ weight.long().T)


def test_step_weights() -> None:
    assert step_weights("binary", 3).tolist() == [1, 1, 1]
    assert step_weights("ternary", 2).tolist() == [1, 1]
    assert step_weights("bitwise", 4).tolist() == [1, 2, 4, 8]
    assert step_weights("bitwise_bidirectional", 3).tolist() == [1, 2, 4]
    assert step_weights("bitwise_twos_complement", 4).tolist() == [1, 2, 4, -8]


WRONG_TRAINS = {
    # Counts, coding, number of steps: what the error says.
    (-3.0, "binary", None): "count holds -3; coding=binary has no sign, use ternary",
    (-3.0, "bitwise", None): "coding=bitwise has no sign, use bitwise_bidirectional",
    (12.0, "bitwise", 3): "num_steps=3 cannot hold the count 12 in coding=bitwise; it needs 4",
    (-8.0, "bitwise_twos_complement", 3): "cannot hold the count -8 .* it needs 4",
    (8.0, "bitwise_twos_complement", 4): "cannot hold the count 8 .* it needs 5",
    (-5.0, "ternary", 4): "num_steps=4 cannot hold the count -5 .* it needs 5",
    (1.0, "ternary", 0): "num_steps=0 must be at least 1",
    (1.0, "bitwise", 64): "num_steps=64 exceeds the 63 bits",
    (0.5, "ternary", None): "count holds 0.5, which is no integer",
    (math.nan, "ternary", None): "count holds nan, which is no integer",
    (math.inf, "ternary", None): "count holds inf in size",
    (-(2.0**62), "bitwise_bidirectional", None): "only integers below 2\\^62 work",
    (1.0, "unary", None): "coding='unary' is unknown; there are binary, ternary, bitwise",
}


@pytest.mark.parametrize(("given_", "message"), WRONG_TRAINS.items(), ids=str)
def test_impossible_trains_are_refused(given_: tuple[float, str, int | None], message: str) -> None:
    value, coding, num_steps = given_
    with pytest.raises(ValueError, match=message):
        encode(torch.tensor([0.0, value]), coding, num_steps=num_steps)


def test_a_train_has_steps_and_a_known_coding() -> None:
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        decode(torch.zeros(0, 3, dtype=torch.int8), "binary")
    with pytest.raises(ValueError, match="coding='morse' is unknown"):
        decode(torch.zeros(1, 3, dtype=torch.int8), "morse")


# Histograms and statistics


@implementations
@pytest.mark.parametrize("max_count", [1, 6, 255, 5000])
def test_histogram_counts_every_size(max_count: int, impl: str) -> None:
    for count in (
        (torch.randn(3, 5, 211) * 9).round().transpose(0, 1),
        (torch.randn(500) * 300).round().bfloat16(),
        torch.tensor([0.0, -1.0, 7.0, 1e30, math.inf, -math.inf, math.nan]),
        torch.zeros(0, 4),
    ):
        sizes = count.flatten().float().abs().nan_to_num(posinf=max_count).clamp(max=max_count)
        expected = Counter(int(size) for size in sizes)
        histogram = spike_histogram(count, max_count, impl=impl)
        assert histogram.dtype == torch.int64
        assert histogram.tolist() == [expected[n] for n in range(max_count + 1)]


@integer_implementations
def test_histogram_of_integers(impl: str) -> None:
    count = torch.tensor([-128, 127, 0, 0, -1])
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        histogram = spike_histogram(count.to(dtype), 127, impl=impl)
        assert histogram.nonzero().flatten().tolist() == [0, 1, 127]
        assert histogram[[0, 1, 127]].tolist() == [2, 1, 2]


@pytest.mark.parametrize("max_count", [0, 65_536])
def test_histogram_has_a_sensible_number_of_bins(max_count: int) -> None:
    with pytest.raises(ValueError, match=f"max_count={max_count} must be within 1 and 65535"):
        spike_histogram(torch.ones(3), max_count)


SIMULATED = {
    ("normal", 3.0): (0.954, 0.106, 1.299, 0.567, 0.572),
    ("normal", 2.0): (0.997, 0.158, 1.075, 0.642, 0.642),
    ("laplace", 3.0): (0.918, 0.153, 1.224, 0.592, 0.614),
    ("laplace", 2.0): (0.977, 0.221, 1.007, 0.664, 0.670),
}
"""Section 2 of the reference numbers, rows of 1,000 channels."""


@pytest.mark.parametrize("impl", ["torch", CPP])
@pytest.mark.parametrize(("shape", "k"), SIMULATED, ids=lambda value: str(value))
def test_statistics_equal_the_simulated_check_values(shape: str, k: float, impl: str) -> None:
    x = torch.randn(500, 1000)
    if shape == "laplace":
        x = torch.distributions.Laplace(0.0, 1.0).sample((500, 1000))
    count, _ = spike_count(x, k, impl=impl)
    found = spike_statistics(spike_histogram(count, impl=impl))
    keys = ("share_within_7", "share_silent", "mean_spikes", "sparsity_all", "sparsity_within_7")
    # Spikes deviate by 0.9, shares and sparsities by less than 0.45: three standard errors of
    # 500,000 draws are 0.004 and 0.002. Half a digit of the published values is 0.0005.
    allowed = dict.fromkeys(keys, 0.0025) | {"mean_spikes": 0.0045}
    for key, expected in zip(keys, SIMULATED[shape, k], strict=True):
        assert found[key] == pytest.approx(expected, abs=allowed[key]), key


def test_statistics_follow_their_definitions() -> None:
    count = torch.tensor([0.0, 1.0, -3.0, 7.0, 16.0, 17.0, -40.0, 4.0])
    bits = [0, 1, 2, 3, 1, 2, 2, 1]
    for num_steps in (3, 4):
        found = spike_statistics(spike_histogram(count), num_steps)
        assert found["mean_spikes"] == pytest.approx(sum(bits) / 8)
        assert found["sparsity_all"] == pytest.approx(1 - sum(bits) / 8 / num_steps)
        assert found["sparsity_within_7"] == pytest.approx(1 - (0 + 1 + 2 + 3 + 1) / 5 / num_steps)
        assert found["share_silent"] == pytest.approx(1 / 8)
        assert found["share_within_7"] == pytest.approx(5 / 8)
        assert found["share_above_16"] == pytest.approx(2 / 8)
    histogram = found["histogram"]
    assert isinstance(histogram, list)
    assert len(histogram) == 17
    assert math.fsum(histogram) == pytest.approx(1.0)
    assert histogram[16] == pytest.approx(3 / 8)
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        spike_statistics(torch.ones(MAX_COUNT + 1), 0)


# Products

PRODUCTS = {"M1-K1-N1": (1, 1, 1), "M5-K17-N33": (5, 17, 33), "M6-K130-N70": (2, 3, 130, 70)}
PRODUCTS |= {"M70-K300-N65": (70, 300, 65), "K40-N3": (40, 3), "M0-K8-N4": (0, 8, 4)}


@integer_implementations
@pytest.mark.parametrize("shape", PRODUCTS.values(), ids=PRODUCTS.keys())
def test_products_are_exact(shape: tuple[int, ...], impl: str) -> None:
    *rows, inputs, outputs = shape
    weight = torch.randint(-128, 128, (inputs, outputs), dtype=torch.int8).T
    narrow = torch.randint(-128, 128, (inputs, *rows), dtype=torch.int8).movedim(0, -1)
    wide = torch.randint(-40_000, 40_000, (*rows, inputs))
    for count in (narrow, narrow.bfloat16(), wide, wide.float()):
        product = spike_matmul(count, weight, impl=impl)
        assert product.dtype == torch.int32
        assert torch.equal(product.long(), count.long() @ weight.long().T)


@settings(deadline=None, max_examples=60, database=None)
@given(sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)))
def test_products_of_every_shape_and_stride_are_exact(sizes: tuple[int, int, int]) -> None:
    rows, inputs, outputs = sizes
    for count in (torch.ones(rows, inputs).char(), torch.ones(inputs, rows).char().T):
        count = torch.randint_like(count, -128, 128)
        for weight in (torch.ones(outputs, inputs).char(), torch.ones(inputs, outputs).char().T):
            weight = torch.randint_like(weight, -128, 128)
            product = spike_matmul(count, weight, impl="torch")
            assert torch.equal(product.long(), count.long() @ weight.long().T)


@integer_implementations
def test_products_of_counts_at_the_edges_of_a_digit(impl: str) -> None:
    edges = [127, 128, 129, 255, 256, 32_639, 32_640, 32_768, 65_535, 2**23 - 1, 2**23, 2**24 - 1]
    weight = torch.tensor([[-128], [127], [1], [0]], dtype=torch.int8)
    for edge in edges:
        count = torch.tensor([[edge], [-edge]])
        product = spike_matmul(count, weight, impl=impl)
        assert torch.equal(product.long(), count * weight.long().T)


@pytest.mark.parametrize("has_instruction", [True, False])
def test_the_largest_sums_are_exact(has_instruction: bool) -> None:
    count = torch.randint(120, 128, (5, 3001), dtype=torch.int8)
    count[0] = -128
    with mock.patch("torch.cpu._is_vnni_supported", return_value=has_instruction):
        product = spike_matmul(count, count, impl="torch")
    assert torch.equal(product.long(), count.long() @ count.long().T)


WRONG_PRODUCTS = {
    # Counts, weight: what the error says.
    "dtype": (torch.ones(2, 3), torch.ones(4, 3), "weight is torch.float32 .* give int8"),
    "inputs": (torch.ones(2, 5), torch.ones(4, 3).char(), "last dim must be the 3 inputs"),
    "half": (torch.full((2, 3), 1.5), torch.ones(4, 3).char(), "count holds 1.5"),
    "large": (torch.tensor([[2**23, -(2**23)]]), torch.ones(4, 2).char(), "counts up to 8388608"),
}


@pytest.mark.parametrize(
    ("count", "weight", "message"), WRONG_PRODUCTS.values(), ids=WRONG_PRODUCTS
)
def test_impossible_products_are_refused(
    count: torch.Tensor, weight: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spike_matmul(count, weight)
