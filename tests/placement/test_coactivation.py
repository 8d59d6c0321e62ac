"""Slots per row: exact where pairs say it all, and never too small elsewhere."""

import numpy as np
import pytest

from moe_lightning.placement.coactivation import slots_per_row


def chosen(num_rows, num_experts, top_k, seed):
    random = np.random.default_rng(seed)
    chosen_TE = np.zeros((num_rows, num_experts), np.int64)
    for row in chosen_TE:
        row[random.choice(num_experts, top_k, replace=False)] = 1
    return chosen_TE


def placed(num_experts, num_slots, seed):
    slot_E = np.random.default_rng(seed).integers(0, num_slots, num_experts)
    return np.eye(num_slots, dtype=bool)[slot_E]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_against_a_count_of_rows(top_k, seed) -> None:
    chosen_TE, held_ES = chosen(50, 8, top_k, seed), placed(8, 3, seed)
    counted = ((chosen_TE @ held_ES) > 0).sum(axis=1).mean()
    estimate = slots_per_row(held_ES, chosen_TE.T @ chosen_TE)
    if top_k == 1:
        assert estimate == pytest.approx(counted)
    assert estimate >= counted - 1e-9


def test_pairs_on_slots_of_two_are_exact() -> None:
    chosen_TE, held_ES = chosen(50, 8, 4, 0), np.eye(4, dtype=bool).repeat(2, axis=0)
    counted = ((chosen_TE @ held_ES) > 0).sum(axis=1).mean()
    assert slots_per_row(held_ES, chosen_TE.T @ chosen_TE) == pytest.approx(counted)


def test_no_rows_go_nowhere() -> None:
    assert slots_per_row(placed(4, 2, 0), np.zeros((4, 4), np.int64)) == 0.0
