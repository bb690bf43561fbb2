"""Which experts are copied where."""

import pytest
import torch

from parallel.hot_experts import MARGIN, HotExperts, plan_copies

# A copy weighs as much as 100 rows on their four ways.
ROW_BYTES, COPY_BYTES = 10, 4000
WORTH_IT = int(100 * MARGIN) + 1


def plan(rows: list[list[int]], max_copies: int = 8) -> list[list[int]]:
    """Return the experts copied to each rank."""
    copied = plan_copies(
        torch.tensor(rows), row_bytes=ROW_BYTES, copy_bytes=COPY_BYTES, max_copies=max_copies
    )
    return [experts.nonzero().flatten().tolist() for experts in copied]


def test_what_saves_bytes_is_copied_and_nothing_else() -> None:
    # Two ranks with two experts each: a rank needs no copy of its own.
    assert plan([[999, 999, WORTH_IT, WORTH_IT - 1], [0, WORTH_IT, 999, 999]]) == [[2], [1]]


def test_an_expert_that_gets_all_tokens_is_copied_to_all_other_ranks() -> None:
    assert plan([[500, 0, 0, 0]] * 4) == [[], [0], [0], [0]]


def test_a_balanced_load_copies_nothing() -> None:
    assert plan([[100] * 8] * 4) == [[]] * 4


@pytest.mark.parametrize(
    ("max_copies", "copies"), [(0, []), (1, [7]), (2, [5, 7]), (3, [4, 5, 7]), (9, [4, 5, 6, 7])]
)
def test_those_that_save_most_are_copied_first(max_copies: int, copies: list[int]) -> None:
    rows = [[900, 0, 0, 0, 400, 500, 300, 600], [0] * 8]
    assert plan(rows, max_copies) == [copies, []]


def test_of_equal_ones_the_first_is_copied() -> None:
    rows = [[0] * 6 + [300] * 6, [300] * 6 + [0] * 6]
    assert plan(rows, 2) == [[6, 7], [0, 1]]


def test_more_copies_than_experts_are_no_error() -> None:
    assert plan([[0, 300], [300, 0]], 100) == [[1], [0]]


def test_no_experts_are_no_error() -> None:
    none = HotExperts()
    none.count("layers.0", torch.ones(4, dtype=torch.int64))
    none.end_step()
    assert none.rows.shape == (1, 0, 0)
    lent = none.lend("layers.0")
    assert lent.own is None
    assert lent.copied == []


def test_rows_are_those_of_one_step_and_of_layers_of_any_size() -> None:
    hot_experts = HotExperts({"a": [torch.zeros(2, 3, 5)], "b": [torch.zeros(4, 3, 5)]})
    for _ in range(2):
        hot_experts.count("b", torch.tensor([1, 2, 3, 4]))
        hot_experts.count("a", torch.tensor([5, 6]))
        hot_experts.count("b", torch.tensor([0, 0, 0, 1]))
        hot_experts.end_step()
        assert hot_experts.rows.tolist() == [[[5, 6, 0, 0], [1, 2, 3, 5]]]
    assert not hot_experts.copied.any()
