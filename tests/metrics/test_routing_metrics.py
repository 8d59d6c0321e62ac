"""The metrics against closed forms, and over two ranks."""

import math

import pytest
import torch
from ranks import run_on_ranks

from moe_lightning.metrics import (
    ExpertCoactivation,
    ExpertLoad,
    LoadImbalance,
    RouterEntropy,
    expert_coactivation,
    expert_load,
    load_imbalance,
    router_entropy,
)

INDEX_TK = torch.tensor([[0, 2], [2, 1], [2, 3]])


def test_rows_of_each_expert():
    assert expert_load(INDEX_TK, 5).tolist() == [1, 1, 3, 1, 0]
    assert expert_load(INDEX_TK[:0], 3).tolist() == [0, 0, 0]
    assert expert_load(torch.zeros(4, 1, dtype=torch.int64), 1).tolist() == [4]


def test_what_is_no_expert_is_not_counted():
    index_TK = torch.tensor([[0, -1], [4, 3], [3, 99]])
    assert expert_load(index_TK, 4).tolist() == [1, 0, 0, 2]
    assert expert_coactivation(index_TK, 4).sum() == 3, "each alone in its row"


@pytest.mark.parametrize("num_experts", [1, 2, 7, 256])
def test_even_and_one_for_all(num_experts):
    even_E = torch.full((num_experts,), 12)
    assert load_imbalance(even_E) == 1
    assert load_imbalance(even_E, "cv") == 0
    assert router_entropy(even_E) == pytest.approx(1)
    assert router_entropy(even_E, normalise=False) == pytest.approx(math.log(num_experts))
    one_E = torch.zeros(num_experts, dtype=torch.int64)
    one_E[-1] = 5
    assert load_imbalance(one_E) == num_experts
    assert load_imbalance(one_E, "cv") == pytest.approx(math.sqrt(num_experts - 1))
    assert router_entropy(one_E, normalise=False) == 0
    assert router_entropy(one_E) == (1 if num_experts == 1 else 0)


def test_a_case_by_hand():
    load_E = torch.tensor([6, 1, 1, 0])
    assert load_imbalance(load_E) == 3
    assert load_imbalance(load_E, "cv") == pytest.approx(math.sqrt((16 + 1 + 1 + 4) / 4) / 2)
    bits = 0.75 * math.log2(4 / 3) + 2 * 0.125 * 3
    assert router_entropy(load_E) == pytest.approx(bits / 2)


def test_no_rows_are_spread_evenly():
    nothing_E = torch.zeros(4, dtype=torch.int64)
    assert load_imbalance(nothing_E) == 1
    assert load_imbalance(nothing_E, "cv") == 0
    assert router_entropy(nothing_E) == 1


def test_layers_at_once():
    load_LE = torch.tensor([[2, 2], [4, 0], [0, 0]])
    assert load_imbalance(load_LE).tolist() == [1, 2, 1]
    assert router_entropy(load_LE).tolist() == pytest.approx([1, 0, 1])


def test_experts_chosen_together():
    assert expert_coactivation(INDEX_TK, 4).tolist() == [
        [1, 0, 1, 0],
        [0, 1, 1, 0],
        [1, 1, 3, 1],
        [0, 0, 1, 1],
    ]
    one_each = torch.tensor([[0], [1], [1]])
    assert expert_coactivation(one_each, 2).tolist() == [[1, 0], [0, 2]]


def metrics():
    return [
        ExpertLoad(4),
        LoadImbalance(4),
        LoadImbalance(4, "cv"),
        RouterEntropy(4),
        RouterEntropy(4, normalise=False),
        ExpertCoactivation(4),
    ]


def test_classes_add_up_batches():
    for metric in metrics():
        metric.update(INDEX_TK[:1])
        metric.update(INDEX_TK[1:])
        whole = type(metric)(4) if not isinstance(metric, LoadImbalance | RouterEntropy) else None
        if whole is None:
            continue
        whole.update(INDEX_TK)
        assert torch.equal(metric.compute(), whole.compute())
        metric.reset()
        assert metric.compute().sum() == 0
    load = LoadImbalance(4)
    load.update(INDEX_TK)
    assert load.compute() == 2  # 3 of 6 rows, on 4 experts
    assert load(torch.tensor([[0, 1]])) == 2, "forward gives that of the batch alone"


def test_two_ranks_add_up():
    """Rank 1 has no rows: both compute the same from all of them."""
    for values in run_on_ranks(2, _compute_over_ranks):
        assert values[0] == [1, 1, 3, 1]
        assert values[1] == pytest.approx(3 / 1.5)
        assert values[2] == pytest.approx(math.sqrt(3 / 4) / 1.5)
        assert values[5][2] == [1, 1, 3, 1]


def _compute_over_ranks():
    import torch.distributed as dist

    values = []
    for metric in metrics():
        metric.update(INDEX_TK[: 3 if dist.get_rank() == 0 else 0])
        values.append(metric.compute().tolist())
    return values


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="kind='mean'"):
        LoadImbalance(4, "mean")
    with pytest.raises(ValueError, match="num_experts=0"):
        ExpertLoad(0)


def test_plots(tmp_path):
    for number, metric in enumerate(metrics()):
        metric.update(INDEX_TK)
        figure, axes = metric.plot()
        if isinstance(metric, ExpertCoactivation) or type(metric) is ExpertLoad:
            assert axes.get_xlabel()
            assert axes.get_ylabel()
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 1000
