"""Heads shared out over the ranks of Ulysses: each query head once, beside its key head."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.sequence.all_to_all import HeadPlan, plan_heads


def count_computed(plan: HeadPlan) -> int:
    """Return the query heads that all ranks compute, zeros included."""
    return sum(len(heads) for heads in plan.query)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "num_ranks", "computed"),
    [
        (28, 4, 4, 28),
        (28, 4, 8, 32),
        (28, 4, 16, 32),
        (40, 8, 16, 48),
        (6, 2, 1, 6),
        (6, 2, 2, 6),
        (6, 2, 4, 8),
        (6, 2, 8, 8),
        (5, 5, 3, 6),
        (4, 1, 3, 6),
    ],
)
def test_as_few_heads_of_zeros_as_can_be(
    num_heads: int, num_kv_heads: int, num_ranks: int, computed: int
) -> None:
    assert count_computed(plan_heads(num_heads, num_kv_heads, num_ranks)) == computed


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 16))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_query_head_meets_its_key_head_once(
    group: int, num_kv_heads: int, num_ranks: int
) -> None:
    num_heads = group * num_kv_heads
    try:
        plan = plan_heads(num_heads, num_kv_heads, num_ranks)
    except ValueError as error:
        assert_remedy_works(str(error), num_heads, num_kv_heads)
        return
    assert len(plan.query) == len(plan.kv) == num_ranks
    assert count_computed(plan) <= 2 * num_heads
    assert sorted(head for heads in plan.query for head in heads if head >= 0) == list(
        range(num_heads)
    )
    assert {head for heads in plan.kv for head in heads if head >= 0} == set(range(num_kv_heads))
    for query, kv in zip(plan.query, plan.kv, strict=True):
        assert (len(query), len(kv)) == (len(plan.query[0]), len(plan.kv[0]))
        each = len(query) // len(kv)  # the operator gives query head i the key head i // each
        assert len(query) == each * len(kv)
        for index, head in enumerate(query):
            if head >= 0:
                assert kv[index // each] == head // group


def assert_remedy_works(message: str, num_heads: int, num_kv_heads: int) -> None:
    named = re.search(r"use parallel\.ulysses=([\d or]+), or parallel\.ring", message)
    assert named, message
    sizes = [int(size) for size in named[1].split(" or ")]
    for size in sizes:
        plan_heads(num_heads, num_kv_heads, size)
    assert sizes[0] == 1


def test_too_many_zeros_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.ulysses=16 would pad 3 query heads on 3 key"):
        plan_heads(3, 3, 16)


def test_a_head_of_zeros_is_zero() -> None:
    plan = plan_heads(5, 5, 2)
    x = torch.randn(1, 4, 5, 3)
    assert plan.kv[1] == (3, 4, -1)
    selected = plan.select_kv(x, 1)
    assert torch.equal(selected[:, :, :2], x[:, :, 3:])
    assert not selected[:, :, 2].any()
