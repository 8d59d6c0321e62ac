from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.data.batching import padding_share, plan_batches


def as_lists(batches: list[np.ndarray]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def test_docstring_example() -> None:
    batches = plan_batches(np.array([5, 2, 9, 3]), budget_tokens=10)
    assert as_lists(batches) == [[2], [0, 3], [1]]
    # padded: 9 + 2*5 + 2 = 21, tokens: 19
    assert padding_share(np.array([5, 2, 9, 3]), batches) == pytest.approx(1 - 19 / 21)


def test_equal_lengths_stay_in_input_order() -> None:
    assert as_lists(plan_batches(np.array([4, 4, 4]), budget_tokens=8)) == [[0, 1], [2]]


def test_row_above_the_budget_is_alone() -> None:
    assert as_lists(plan_batches(np.array([1, 50, 1]), budget_tokens=10)) == [[1], [0, 2]]


def test_windows_are_planned_one_after_the_other() -> None:
    lengths = np.array([1, 2, 3, 4, 5])
    assert as_lists(plan_batches(lengths, budget_tokens=100, window_rows=2)) == [
        [1, 0],
        [3, 2],
        [4],
    ]


def test_no_rows_and_zero_costs() -> None:
    assert plan_batches(np.zeros(0, int), budget_tokens=1) == []
    assert padding_share(np.zeros(0, int), []) == 0.0
    assert as_lists(plan_batches(np.array([0, 0, 0]), budget_tokens=2)) == [[0, 1], [2]]


@pytest.mark.parametrize(("budget", "window"), [(0, 1), (-1, 1), (1, 0)])
def test_refuses_no_budget(budget: int, window: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        plan_batches(np.array([1]), budget_tokens=budget, window_rows=window)


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(1, 100), st.integers(1, 30))
def test_plan_invariants(lengths: list[int], budget: int, window: int) -> None:
    costs = np.array(lengths, dtype=np.int64)
    batches = plan_batches(costs, budget_tokens=budget, window_rows=window)
    again = plan_batches(costs.copy(), budget_tokens=budget, window_rows=window)
    assert as_lists(batches) == as_lists(again)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * costs[batch].max() <= budget
        assert len({row // window for row in batch.tolist()}) == 1
        assert (np.diff(costs[batch]) <= 0).all()
    windows = [int(batch[0]) // window for batch in batches]
    assert windows == sorted(windows)
    if budget >= 60:  # no row is too long: batches are as full as they can be within a window
        for left, right in pairwise(batches):
            if left[0] // window == right[0] // window:
                assert (len(left) + 1) * costs[left].max() > budget
