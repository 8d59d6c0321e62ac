"""Rows sorted by expert and back, by hand."""

import torch

from moe_lightning.experts.permute import SortedRows, sort_by_expert, weighted_combine


def test_sort_by_expert_by_hand():
    order_N, expert_N, ends_E = sort_by_expert(torch.tensor([[2, 0], [0, 3], [2, 3]]), 5)
    assert order_N.tolist() == [1, 2, 0, 4, 3, 5]
    assert expert_N.tolist() == [0, 0, 2, 2, 3, 3]
    assert ends_E.tolist() == [2, 2, 4, 6, 6]
    assert ends_E.dtype == torch.int32


def test_pairs_elsewhere_are_cut_off_on_a_cpu():
    order_N, expert_N, ends_E = sort_by_expert(torch.tensor([[3, 1], [0, 3], [3, 3]]), 3)
    assert order_N.tolist() == [2, 1]
    assert expert_N.tolist() == [0, 1]
    assert ends_E.tolist() == [1, 2, 2]


def test_all_pairs_elsewhere_none_at_all_and_no_experts():
    for index_TK, num_experts in (
        (torch.full((3, 2), 4), 4),
        (torch.zeros(0, 2, dtype=torch.int64), 4),
        (torch.zeros(3, 2, dtype=torch.int64), 0),
    ):
        order_N, expert_N, ends_E = sort_by_expert(index_TK, num_experts)
        assert order_N.shape == expert_N.shape == (0,)
        assert ends_E.tolist() == [0] * num_experts


def test_weighted_combine_by_hand():
    # Sorted rows 0..3 belong to (token, k) pairs 1, 2, 0, 3.
    rows = SortedRows(torch.tensor([1, 2, 0, 3]), torch.tensor([0, 0, 1, 2]), torch.tensor([]))
    rows_ND = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    weights_TK = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    out_TD = weighted_combine(rows_ND, weights_TK, rows)
    assert out_TD.tolist() == [[30.0 + 2 * 10.0], [3 * 20.0 + 0.5 * 40.0]]


def test_weighted_combine_of_pairs_that_are_here_by_hand():
    # Of six pairs, 4 and 1 are here: token 1 has none.
    rows = SortedRows(torch.tensor([4, 1]), torch.tensor([0, 1]), torch.tensor([1, 2]))
    weights_TK = torch.tensor([[float("nan"), 2.0], [7.0, 7.0], [0.5, float("inf")]])
    out_TD = weighted_combine(torch.tensor([[10.0, 1.0], [20.0, 2.0]]), weights_TK, rows)
    assert out_TD.tolist() == [[40.0, 4.0], [0.0, 0.0], [5.0, 0.5]]


def test_the_sum_is_in_the_order_of_k_whatever_the_experts():
    # In float32, (1e8 + 1) - 1e8 is 0 and (1e8 - 1e8) + 1 is 1.
    rows = sort_by_expert(torch.tensor([[2, 0, 1], [1, 2, 0]]), 3)
    values_TK = torch.tensor([[1e8, 1.0, -1e8], [1e8, -1e8, 1.0]])
    sorted_ND = values_TK.reshape(-1)[rows.order_N, None]
    out_TD = weighted_combine(sorted_ND, torch.ones(2, 3), rows)
    assert out_TD.tolist() == [[0.0], [1.0]]
