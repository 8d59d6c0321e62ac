"""Choices between experts that are as good as another are no difference, others are."""

from types import SimpleNamespace

import pytest
import torch

from moe_lightning.verification.comparison import Comparison, _Alone
from moe_lightning.verification.folder import RowFolder, experts_name
from moe_lightning.verification.tolerances import Tolerance

TOLERANCE = 0.01


class Router:
    """Two of four experts, by the four numbers of a row; weights are these numbers' shares."""

    def __init__(self):
        self.layers = {0: SimpleNamespace(num_experts=4)}
        self.model = SimpleNamespace(base_model=SimpleNamespace(layers=[None]))

    def route(self, layer, hidden_TD):
        scores_TK, index_TK = hidden_TD.topk(2, dim=1)
        return index_TK, scores_TK / scores_TK.sum(1, keepdim=True)


@pytest.fixture
def compare(tmp_path):
    """What is found where one row was routed to these experts with these weights."""

    def compare(scores, index, weights):
        hidden_TD = torch.tensor([scores])
        folder = RowFolder(tmp_path, 0)
        folder.save(
            experts_name(0),
            hidden=hidden_TD,
            index=torch.tensor([index]),
            weights=torch.tensor([weights]),
            out=torch.zeros(1, 4),
        )
        comparison = Comparison(Router(), Tolerance(TOLERANCE, TOLERANCE, ()))
        alone = _Alone(comparison, folder, 0)
        alone.router_input(0, hidden_TD)
        alone.routing(0, hidden_TD, *Router().route(0, hidden_TD))
        found = comparison.layers[0]
        return found.num_ties, found.num_other_choices, found.router.num_over

    return compare


def test_the_same_choice_in_another_order_is_equal(compare) -> None:
    assert compare([3.0, 1.0, 0.1, 0.1], [1, 0], [0.25, 0.75]) == (0, 0, 0)


def test_another_choice_between_equals_is_a_tie(compare) -> None:
    assert compare([3.0, 1.0, 1.001, 0.1], [0, 1], [0.75, 0.25]) == (1, 0, 0)


def test_another_choice_between_unequals_is_a_difference(compare) -> None:
    assert compare([3.0, 1.0, 2.0, 0.1], [0, 1], [0.75, 0.25]) == (0, 1, 1)


def test_weights_that_are_not_normalised_are_a_difference(compare) -> None:
    assert compare([3.0, 1.0, 0.1, 0.1], [0, 1], [0.6, 0.2]) == (0, 0, 1)
