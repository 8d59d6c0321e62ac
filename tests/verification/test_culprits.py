"""Who is to blame for wrong sums; experts are linear maps, so that every sum is a closed form."""

import pytest
import torch

from moe_lightning.verification.culprits import find_culprits
from moe_lightning.verification.layer_rows import LayerRows

NUM_EXPERTS, WIDTH, NUM_ROWS = 6, 8, 60
TOLERANCE = 1e-4


class Layer:
    """Linear experts, random rows and two experts for each."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.maps_EDD = torch.randn(NUM_EXPERTS, WIDTH, WIDTH, generator=generator)
        self.hidden_TD = torch.randn(NUM_ROWS, WIDTH, generator=generator)
        scores_TE = torch.rand(NUM_ROWS, NUM_EXPERTS, generator=generator)
        self.index_TK = scores_TE.topk(2).indices
        self.weights_TK = 0.5 + torch.rand(NUM_ROWS, 2, generator=generator)
        self.slot_TK = torch.full((NUM_ROWS, 2), -1)

    def compute(self, hidden_TD, index_TK, weights_TK, maps_EDD=None):
        maps_EDD = self.maps_EDD if maps_EDD is None else maps_EDD
        outputs_TKD = torch.einsum("td,tkde->tke", hidden_TD, maps_EDD[index_TK])
        return (weights_TK[..., None] * outputs_TKD).sum(1)

    def sums(self, maps_EDD=None):
        return self.compute(self.hidden_TD, self.index_TK, self.weights_TK, maps_EDD)

    def verdict(self, out_TD):
        places = [(position // 10, position % 10) for position in range(NUM_ROWS)]
        parts = (self.hidden_TD, self.index_TK, self.weights_TK, out_TD, self.slot_TK, places)
        return find_culprits(
            LayerRows(*parts), self.compute, num_experts=NUM_EXPERTS, tolerance=TOLERANCE
        )

    def rows_of(self, expert):
        return (self.index_TK == expert).any(1)


@pytest.mark.parametrize("seed", range(5))
def test_one_wrong_expert_is_the_only_culprit(seed) -> None:
    layer = Layer(seed)
    maps_EDD = layer.maps_EDD.clone()
    maps_EDD[4] = layer.maps_EDD[4].T
    verdict = layer.verdict(layer.sums(maps_EDD))
    (culprit,) = verdict.culprits
    assert verdict.factor is None
    assert [tuple(unit) for unit in culprit.units] == [(4, -1)]
    assert culprit.num_rows == culprit.num_computed == int(layer.rows_of(4).sum())
    wrong = layer.rows_of(4).nonzero().squeeze(1).tolist()
    assert list(culprit.examples) == [(p // 10, p % 10) for p in wrong[:5]]
    assert culprit.hint == ""  # nothing that it could be called


@pytest.mark.parametrize("seed", range(5))
def test_a_swapped_pair_is_two_culprits_that_name_each_other(seed) -> None:
    layer = Layer(seed)
    verdict = layer.verdict(layer.sums(layer.maps_EDD[[0, 5, 2, 3, 4, 1]]))
    hints = {culprit.units[0].expert: culprit.hint for culprit in verdict.culprits}
    assert hints == {
        1: "it computes what expert 5 should",
        5: "it computes what expert 1 should",
    }


def test_an_expert_that_is_left_out_adds_nothing() -> None:
    layer = Layer()
    maps_EDD = layer.maps_EDD.clone()
    maps_EDD[2] = 0
    (culprit,) = layer.verdict(layer.sums(maps_EDD)).culprits
    assert (culprit.units[0].expert, culprit.hint) == (2, "it adds nothing")


def test_an_expert_that_is_off_by_a_factor() -> None:
    layer = Layer()
    maps_EDD = layer.maps_EDD.clone()
    maps_EDD[2] *= 1.5
    (culprit,) = layer.verdict(layer.sums(maps_EDD)).culprits
    assert (culprit.units[0].expert, culprit.hint) == (2, "it is off by a factor of 1.5")


def test_a_bias_that_is_left_out() -> None:
    layer = Layer()
    bias_D = torch.linspace(-1, 1, WIDTH)
    own_T = (layer.weights_TK * (layer.index_TK == 3)).sum(1)
    (culprit,) = layer.verdict(layer.sums() - own_T[:, None] * bias_D).culprits
    assert culprit.units[0].expert == 3
    assert "bias" in culprit.hint


def test_all_sums_off_by_one_factor_blame_no_expert() -> None:
    layer = Layer()
    verdict = layer.verdict(0.5 * layer.sums())
    assert verdict.culprits == []
    assert verdict.factor == pytest.approx((0.5, 0.5), rel=1e-4)


def test_each_row_by_a_factor_of_its_own_is_a_normalisation() -> None:
    layer = Layer()
    sums_T = layer.weights_TK.sum(1)
    verdict = layer.verdict(layer.sums() / (3 * sums_T[:, None]))
    assert verdict.culprits == []
    expected = (float((1 / (3 * sums_T)).min()), float((1 / (3 * sums_T)).max()))
    assert verdict.factor == pytest.approx(expected, rel=1e-4)


def test_a_replica_that_is_wrong_alone() -> None:
    layer = Layer()
    # Even positions are computed in slot 0, odd ones in slot 1.
    layer.slot_TK = (torch.arange(NUM_ROWS) % 2)[:, None].expand(-1, 2).clone()
    is_bad_T = layer.rows_of(4) & (layer.slot_TK[:, 0] == 1)
    maps_EDD = layer.maps_EDD.clone()
    maps_EDD[4] *= -1
    out_TD = torch.where(is_bad_T[:, None], layer.sums(maps_EDD), layer.sums())
    (culprit,) = layer.verdict(out_TD).culprits
    assert [tuple(unit) for unit in culprit.units] == [(4, 1)]
    assert culprit.right_elsewhere == (0,)
    assert culprit.num_computed == int(is_bad_T.sum())


def test_an_expert_that_is_wrong_in_all_its_slots_is_one_culprit() -> None:
    layer = Layer()
    layer.slot_TK = (torch.arange(NUM_ROWS) % 2)[:, None].expand(-1, 2).clone()
    maps_EDD = layer.maps_EDD.clone()
    maps_EDD[4] = layer.maps_EDD[4].T
    (culprit,) = layer.verdict(layer.sums(maps_EDD)).culprits
    assert sorted(tuple(unit) for unit in culprit.units) == [(4, 0), (4, 1)]
    assert culprit.right_elsewhere == ()
    assert culprit.num_rows == int(layer.rows_of(4).sum())


def test_experts_that_always_work_together_cannot_be_told_apart() -> None:
    layer = Layer()
    layer.index_TK = torch.tensor([[0, 1], [2, 3], [4, 5]]).repeat(NUM_ROWS // 3, 1)
    maps_EDD = layer.maps_EDD.clone()
    maps_EDD[2] = layer.maps_EDD[2].T
    (culprit,) = layer.verdict(layer.sums(maps_EDD)).culprits
    assert {unit.expert for unit in culprit.units} == {2, 3}
    assert culprit.hint == ""


def test_a_few_right_looking_rows_clear_nobody_where_none_would_be_left() -> None:
    layer = Layer()
    maps_EDD = layer.maps_EDD.clone()
    maps_EDD[4] = layer.maps_EDD[4].T
    out_TD = layer.sums(maps_EDD)
    right = layer.rows_of(4).nonzero().squeeze(1)[:2]
    out_TD[right] = layer.sums()[right]
    (culprit,) = layer.verdict(out_TD).culprits
    assert culprit.units[0].expert == 4


@pytest.mark.parametrize("seed", range(5))
def test_a_pair_is_found_where_coarse_rounding_hides_it_in_some_rows(seed) -> None:
    layer = Layer(seed)
    out_TD = layer.sums(layer.maps_EDD[[0, 5, 2, 3, 4, 1]])
    wrong = (layer.rows_of(1) | layer.rows_of(5)).nonzero().squeeze(1)
    out_TD[wrong[::7]] = layer.sums()[wrong[::7]]
    culprits = layer.verdict(out_TD).culprits
    assert {unit.expert for culprit in culprits for unit in culprit.units} == {1, 5}
