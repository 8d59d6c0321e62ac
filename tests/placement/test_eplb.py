"""EPLB's convention: what comes out says the same three times, for any numbers."""

import numpy as np
import pytest

from moe_lightning.errors import UsageError
from moe_lightning.placement import ExpertPlacement
from moe_lightning.placement.eplb import from_physical, rebalance_experts, to_physical


# The last three are refused by EPLB itself.
@pytest.mark.parametrize(
    ("num_experts", "num_replicas", "num_groups", "num_nodes", "num_gpus"),
    [(12, 16, 4, 2, 8), (8, 8, 1, 1, 4), (10, 13, 3, 2, 4), (7, 9, 5, 3, 6), (9, 12, 2, 4, 5)],
)
def test_the_three_tables_agree(num_experts, num_replicas, num_groups, num_nodes, num_gpus) -> None:
    weight = np.random.default_rng(0).lognormal(0, 1, (2, num_experts))
    phy2log, log2phy, logcnt = rebalance_experts(
        weight, num_replicas, num_groups, num_nodes, num_gpus
    )
    assert phy2log.shape == (2, num_replicas)
    assert logcnt.sum(axis=1).tolist() == [num_replicas] * 2
    assert log2phy.shape == (2, num_experts, logcnt.max())
    for layer in range(2):
        for expert in range(num_experts):
            places = [p for p in log2phy[layer, expert].tolist() if p != -1]
            assert len(places) == logcnt[layer, expert] >= 1
            assert set(phy2log[layer, places]) == {expert}
        for gpu in np.array_split(phy2log[layer], num_gpus):
            assert len(set(gpu.tolist())) == len(gpu)  # never one expert twice


def test_the_example_of_eplbs_readme_is_as_balanced() -> None:
    # https://github.com/deepseek-ai/EPLB, README: 12 experts, 16 replicas, 4 groups, 2 nodes, 8
    # GPUs; what it prints there puts 176 and 238 rows on the busiest GPU of the two layers.
    weight = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    theirs = np.array(
        [
            [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
            [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
        ]
    )
    phy2log, _, logcnt = rebalance_experts(weight, 16, 4, 2, 8)
    for layer in range(2):
        busiest = []
        for table in (theirs[layer], phy2log[layer]):
            share = weight[layer] / np.bincount(table, minlength=12)
            busiest.append(share[table].reshape(8, 2).sum(axis=1).max())
        assert busiest[1] <= busiest[0]
        nodes = phy2log[layer].reshape(2, 8) // 3  # groups of three experts
        assert not set(nodes[0].tolist()) & set(nodes[1].tolist())
    assert logcnt.sum() == 32


def test_a_placement_comes_back() -> None:
    placement = ExpertPlacement(3, {0: ((0, 1), (2,), (0,)), 1: ((2,), (1,), (1, 2))})
    physical = to_physical(placement)
    assert physical.tolist() == [[0, 2, 0, -1, 1, -1], [-1, -1, 1, 2, 0, 2]]
    assert from_physical(physical, 3) == placement


def test_too_few_or_too_many_physical_experts_are_refused() -> None:
    for num_replicas in (3, 9):
        with pytest.raises(UsageError, match="have 4 copies at least, and 8 at most"):
            rebalance_experts(np.ones((1, 4)), num_replicas, 1, 1, 2)
