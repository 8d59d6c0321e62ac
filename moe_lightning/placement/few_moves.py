"""Few moves: from the placement in use to a good one, without loading more experts than it takes.

A move is a copy of an expert on a slot that did not have it: that slot must load it. Dropping a
copy costs nothing.
"""

from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heappush

import numpy as np

from moe_lightning.placement.layer_problem import Bools, Floats, Ints, LayerProblem
from moe_lightning.placement.layer_search import drop_surplus, improve


def num_moves(new_ES: Bools, have_ES: Bools) -> int:
    """Copies that a slot must load: it holds them in the new placement and did not before."""
    return int((new_ES & ~have_ES).sum())


def from_current(
    problem: LayerProblem, have_ES: Bools, *, good_enough: float = 0.0
) -> Iterator[Bools]:
    """Improve the placement in use step by step.

    Args:
        problem: What is placed.
        have_ES: The placement in use.
        good_enough: A time of the busiest slot below which to stop.

    Yields:
        The placement without surplus replicas, and after each step.
    """
    held_ES = drop_surplus(problem, have_ES)
    yield held_ES
    for step_ES in improve(problem, held_ES):
        if problem.times(held_ES).max() <= good_enough:
            return
        held_ES = step_ES
        yield held_ES


def within_budget(
    problems: Mapping[int, LayerProblem],
    have: Mapping[int, Bools],
    *,
    max_moves: int,
    good_enough: Mapping[int, float],
) -> dict[int, Bools]:
    """Improve the layers whose balance is worst, while moves are left.

    Args:
        problems: What is placed in each layer.
        have: The placement in use.
        max_moves: Moves at most, over all layers.
        good_enough: For each layer a time of the busiest slot below which to stop.

    Returns:
        The placement of each layer.
    """
    steps = {
        layer: from_current(problem, have[layer], good_enough=good_enough[layer])
        for layer, problem in problems.items()
    }
    held = {layer: next(each) for layer, each in steps.items()}
    spent = dict.fromkeys(held, 0)

    def badness(layer: int) -> float:
        problem = problems[layer]
        mean = float(problem.load_E.sum() / problem.speed_S.sum())
        return -float(problem.times(held[layer]).max()) / mean if mean else -1.0

    heap = [(badness(layer), layer) for layer in held]
    heapify(heap)
    while heap:
        _, layer = heappop(heap)
        step_ES = next(steps[layer], None)
        if step_ES is None:
            continue
        cost = num_moves(step_ES, have[layer])
        if sum(spent.values()) - spent[layer] + cost > max_moves:
            continue
        held[layer], spent[layer] = step_ES, cost
        heappush(heap, (badness(layer), layer))
    return held


def relabelled(problem: LayerProblem, new_ES: Bools, have_ES: Bools) -> Bools:
    """Let equal slots exchange all they hold, so that as much as possible is where it was.

    Args:
        problem: What is placed; slots are equal if they are on one node and equally fast.
        new_ES: The placement.
        have_ES: The placement in use.

    Returns:
        The placement with its slots renamed.
    """
    result_ES = new_ES.copy()
    kinds = np.stack([problem.node_S, problem.speed_S, problem.limit_S])
    for kind in np.unique(kinds, axis=1).T:
        slots = np.flatnonzero((kinds == kind[:, None]).all(axis=0))
        kept_SS = new_ES[:, slots].astype(np.float64).T @ have_ES[:, slots]
        result_ES[:, slots[assign(-kept_SS)]] = new_ES[:, slots]
    return result_ES


def assign(cost_NN: Floats) -> Ints:
    """Solve the assignment problem: a column for each row, so that the sum is least.

    Shortest augmenting paths with potentials (Jonker and Volgenant 1987), O(N³).

    >>> assign(np.array([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]])).tolist()
    [1, 0, 2]

    Args:
        cost_NN: Cost of each row and column.

    Returns:
        The column of each row, ``[N]``.
    """
    size = len(cost_NN)
    row_of = np.full(size + 1, -1)  # the last column is where a new row begins
    row_price, col_price = np.zeros(size), np.zeros(size + 1)
    for row in range(size):
        row_of[size] = row
        least, came_from = np.full(size, np.inf), np.full(size, size)
        is_done = np.zeros(size + 1, np.bool_)
        col = size
        while row_of[col] >= 0:
            is_done[col] = True
            here = row_of[col]
            slack = cost_NN[here] - row_price[here] - col_price[:size]
            is_shorter = ~is_done[:size] & (slack < least)
            least[is_shorter], came_from[is_shorter] = slack[is_shorter], col
            following = int(np.where(is_done[:size], np.inf, least).argmin())
            step = least[following]
            row_price[row_of[is_done]] += step
            col_price[is_done] -= step
            least[~is_done[:size]] -= step
            col = following
        while col != size:
            row_of[col] = row_of[came_from[col]]
            col = int(came_from[col])
    column_of = np.empty(size, np.int64)
    column_of[row_of[:size]] = np.arange(size)
    return column_of
