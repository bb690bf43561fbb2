"""Spike counts: eq. 19 and 21 by hand, the straight-through gradient, extremes, statistics."""

import math

import pytest
import torch
from helpers.assertions import assert_close

from models.spiking import MAX_COUNT, spike_statistics
from ops.spike import spike_count

IMPLEMENTATIONS = ("reference", "torch")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)

pytestmark = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def dtype_id(value: object) -> str | None:
    return str(value)[6:] if isinstance(value, torch.dtype) else None


def by_hand(row: list[float], k: float) -> tuple[list[int], float]:
    """Return counts and threshold of one token in Python's own arithmetic."""
    threshold = min(max(sum(abs(x) for x in row) / len(row) / k, 1e-5), 1e4)
    return [round(x / threshold) for x in row], threshold


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


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_implementations_agree_bit_for_bit(dtype: torch.dtype, impl: str) -> None:
    x = (torch.randn(64, 96) * torch.logspace(-7, 7, 64)[:, None]).to(dtype)
    count, threshold = spike_count(x, impl=impl)
    expected_count, expected_threshold = spike_count(x, impl="reference")
    assert count.dtype == dtype
    assert threshold.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(count, count.round())
    assert torch.equal(count, expected_count)
    assert torch.equal(threshold, expected_threshold)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradient_passes_straight_through(dtype: torch.dtype, impl: str) -> None:
    x = torch.randn(5, 33).to(dtype).requires_grad_()
    count, threshold = spike_count(x, impl=impl)
    assert not threshold.requires_grad
    dcount = torch.randn(5, 33).to(dtype)
    (dx,) = torch.autograd.grad(count, x, dcount)
    assert dx.dtype == dtype
    assert_close("dx", dx, dcount.double() / threshold.double(), dtype)


def test_threshold_times_count_has_the_gradient_of_the_identity(impl: str) -> None:
    x = torch.randn(5, 33, dtype=torch.float64, requires_grad=True)
    count, threshold = spike_count(x, impl=impl)
    (dx,) = torch.autograd.grad((count * threshold).sum(), x)
    assert_close("dx", dx, torch.ones_like(dx), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_zeros_are_silent(dtype: torch.dtype, impl: str) -> None:
    x = torch.zeros(2, 8, dtype=dtype, requires_grad=True)
    count, threshold = spike_count(x, impl=impl)
    assert torch.equal(count, torch.zeros_like(x))
    assert threshold.flatten().tolist() == pytest.approx([1e-5] * 2)
    (dx,) = torch.autograd.grad(count.sum(), x)
    assert dx.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_huge_values_count_against_the_largest_threshold(dtype: torch.dtype, impl: str) -> None:
    x = torch.tensor([[1e8, -1e8, 0.0]]).to(dtype)
    count, threshold = spike_count(x, impl=impl)
    assert threshold.tolist() == [[1e4]]
    assert_close("count", count, x.double() / 1e4, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_one_huge_channel_silences_the_others(dtype: torch.dtype, impl: str) -> None:
    x = torch.full((1, 300), 0.1, dtype=dtype)
    x[0, 7] = 5000.0
    count, threshold = spike_count(x, impl=impl)
    # The mean is about 5000 / 300, so that the one channel spikes k * 300 times.
    assert float(count[0, 7]) == pytest.approx(900, rel=0.01)
    assert int(count.count_nonzero()) == 1
    assert float(threshold) == pytest.approx((5000 + 299 * 0.1) / 300 / 3, rel=0.01)


def test_tiny_values_count_against_the_smallest_threshold(impl: str) -> None:
    count, threshold = spike_count(torch.tensor([[4e-6, -6e-6, 2.4e-5]]), impl=impl)
    assert count.tolist() == [[0.0, -1.0, 2.0]]
    assert float(threshold) == pytest.approx(1e-5)


def test_k_must_be_positive(impl: str) -> None:
    with pytest.raises(ValueError, match="k=0 must be above 0"):
        spike_count(torch.ones(1, 3), 0, impl=impl)


SIMULATED = {
    ("normal", 3.0): (0.954, 0.106, 1.299, 0.567, 0.572),
    ("normal", 2.0): (0.997, 0.158, 1.075, 0.642, 0.642),
    ("laplace", 3.0): (0.918, 0.153, 1.224, 0.592, 0.614),
    ("laplace", 2.0): (0.977, 0.221, 1.007, 0.664, 0.670),
}
"""Section 2 of the reference numbers, rows of 1,000 channels."""


@pytest.mark.parametrize(("shape", "k"), SIMULATED, ids=lambda value: str(value))
def test_statistics_equal_the_simulated_check_values(shape: str, k: float, impl: str) -> None:
    x = torch.randn(500, 1000)
    if shape == "laplace":
        x = torch.distributions.Laplace(0.0, 1.0).sample((500, 1000))
    count, _ = spike_count(x, k, impl=impl)
    sizes = count.abs().long().clamp(max=MAX_COUNT).flatten()
    found = spike_statistics(torch.bincount(sizes, minlength=MAX_COUNT + 1))
    keys = ("share_within_7", "share_silent", "mean_spikes", "sparsity_all", "sparsity_within_7")
    for key, expected in zip(keys, SIMULATED[shape, k], strict=True):
        assert found[key] == pytest.approx(expected, abs=0.002), key


def test_statistics_follow_their_definitions(impl: str) -> None:
    x = torch.tensor([[0.0, 1.0, -3.0, 7.0, 8.0, 17.0, -40.0, 4.0]], dtype=torch.float64)
    count, threshold = spike_count(x, float(x.abs().mean()), impl=impl)  # threshold 1
    assert float(threshold) == 1.0
    sizes = count.abs().long().flatten()
    found = spike_statistics(torch.bincount(sizes, minlength=MAX_COUNT + 1))
    bits = [0, 1, 2, 3, 1, 2, 2, 1]
    assert found["mean_spikes"] == pytest.approx(sum(bits) / 8)
    assert found["sparsity_all"] == pytest.approx(1 - sum(bits) / 8 / 3)
    assert found["sparsity_within_7"] == pytest.approx(1 - (0 + 1 + 2 + 3 + 1) / 5 / 3)
    assert found["share_silent"] == pytest.approx(1 / 8)
    assert found["share_within_7"] == pytest.approx(5 / 8)
    assert found["share_above_16"] == pytest.approx(2 / 8)
    histogram = found["histogram"]
    assert isinstance(histogram, list)
    assert len(histogram) == 17
    assert math.fsum(histogram) == pytest.approx(1.0)
    assert histogram[16] == pytest.approx(2 / 8)
