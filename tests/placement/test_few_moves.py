"""The assignment problem, against all permutations."""

from itertools import permutations

import numpy as np
import pytest

from moe_lightning.placement.few_moves import assign


@pytest.mark.parametrize("seed", range(20))
def test_the_assignment_is_the_cheapest_of_all(seed) -> None:
    random = np.random.default_rng(seed)
    size = int(random.integers(1, 7))
    cost_NN = random.integers(-5, 6, (size, size)).astype(np.float64)
    columns = assign(cost_NN)
    assert sorted(columns.tolist()) == list(range(size))
    rows = np.arange(size)
    least = min(cost_NN[rows, list(each)].sum() for each in permutations(range(size)))
    assert cost_NN[rows, columns].sum() == least
