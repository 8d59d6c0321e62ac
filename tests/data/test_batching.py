from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.data.batching import padding_share, plan_batches, split_by_length


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


def test_split_by_length_weighs_padding_against_forwards():
    # One forward: 5 + 4 * 9 = 41. Two: 5 + 2 * 9 + 5 + 2 * 2 = 32.
    assert split_by_length([9, 2, 8, 2], forward_tokens=5, budget_tokens=100) == [[0, 2], [1, 3]]
    # A forward that costs more than the padding it saves is not worth it.
    assert split_by_length([9, 2, 8, 2], forward_tokens=50, budget_tokens=100) == [[0, 2, 1, 3]]
    # The budget holds, and a row beyond it gets a forward of its own.
    assert split_by_length([9, 2, 8, 2], forward_tokens=50, budget_tokens=8) == [[0], [2], [1, 3]]
    assert split_by_length([], forward_tokens=5, budget_tokens=8) == []


@given(st.lists(st.integers(1, 30), max_size=7), st.integers(0, 40), st.integers(1, 80))
def test_split_by_length_is_as_cheap_as_the_best_of_all_splits(lengths, forward_tokens, budget):
    groups = split_by_length(lengths, forward_tokens=forward_tokens, budget_tokens=budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))

    def cost(parts):
        return sum(forward_tokens + max(part) * len(part) for part in parts)

    ordered = sorted(lengths, reverse=True)
    best = 0 if not ordered else None
    for cuts in product([False, True], repeat=max(0, len(ordered) - 1)):
        parts, part = [], ordered[:1]
        for is_cut, length in zip(cuts, ordered[1:], strict=True):
            if is_cut:
                parts.append(part)
                part = []
            part = [*part, length]
        parts = [p for p in [*parts, part] if p]
        if all(len(p) == 1 or max(p) * len(p) <= budget for p in parts):
            best = cost(parts) if best is None else min(best, cost(parts))
    assert cost([[lengths[i] for i in group] for group in groups]) == best
