"""The experts of one layer that a process holds, in shards that came at different times."""

from dataclasses import dataclass

import pytest
import torch
from made_up_experts import ALL, D, E, assert_close, make_experts, own, rows_of

from moe_lightning.experts import ExpertShard, HeldExperts

CPU = torch.device("cpu")
ELSEWHERE = 4


@dataclass
class TimesShard:
    """A shard whose expert e multiplies a row by 10 to the power of e."""

    expert_ids: tuple[int, ...]
    device: torch.device = CPU

    def compute(self, rows_RD, index_RK, weights_RK):
        factors = torch.tensor([*(10.0**expert for expert in self.expert_ids), 0.0])
        return rows_RD * (factors[index_RK] * weights_RK).sum(1, keepdim=True)


def held(*shards):
    experts = HeldExperts(4)
    for ids in shards:
        experts.add(TimesShard(ids))
    return experts


ROWS_RD = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
WEIGHTS_RK = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    "shards", [[(0, 1, 2, 3)], [(3, 0, 2, 1)], [(0, 1), (2, 3)], [(2,), (3, 0), (1,)]]
)
def test_the_weighted_sum_by_hand_however_many_shards_there_are(shards):
    index_RK = torch.tensor([[0, 3], [2, 1]])
    out_RD = held(*shards).compute(ROWS_RD, index_RK, WEIGHTS_RK)
    # 1 + 2 * 1000, 3 * 100 + 4 * 10
    assert torch.equal(out_RD, ROWS_RD * torch.tensor([[2001.0], [340.0]]))
    assert ROWS_RD.tolist() == [[1, 2], [3, 4]], "the rows are somebody else's"


def test_pairs_elsewhere_add_nothing():
    experts = held((3,), (1,))
    index_RK = torch.tensor([[ELSEWHERE, 3], [ELSEWHERE, ELSEWHERE]])
    out_RD = experts.compute(ROWS_RD, index_RK, WEIGHTS_RK)
    assert out_RD.tolist() == [[2000, 4000], [0, 0]]


def test_with_nothing_held_the_sum_is_zero():
    index_RK = torch.full((2, 2), ELSEWHERE)
    out_RD = held().compute(ROWS_RD.bfloat16(), index_RK, WEIGHTS_RK)
    assert out_RD.dtype == torch.bfloat16
    assert out_RD.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("shards", [[], [(1,)], [(1,), (0, 3)]])
def test_no_rows(shards):
    out_RD = held(*shards).compute(
        ROWS_RD[:0], torch.empty(0, 2, dtype=torch.int64), WEIGHTS_RK[:0]
    )
    assert out_RD.shape == (0, 2)


def test_what_is_held():
    experts = held((3, 0))
    assert experts.expert_ids == (0, 3)
    assert experts.missing([2, 3, 0, 1]) == [2, 1]
    assert experts.holds(torch.tensor([[0, 3], [3, ELSEWHERE]]))
    assert not experts.holds(torch.tensor([[0, 3], [3, 1]]))
    assert experts.holds(torch.empty(0, 2, dtype=torch.int64))
    experts.add(TimesShard((1,)))
    assert experts.expert_ids == (0, 1, 3)
    assert experts.holds(torch.tensor([[0, 3], [3, 1]]))
    assert [shard.expert_ids for shard in experts.shards] == [(3, 0), (1,)]


def test_a_number_that_no_expert_has_is_not_held():
    """It is read from a message: a wrong one must not be taken for another expert's."""
    experts = held((0, 1, 2, 3))
    for number in (ELSEWHERE + 1, 30_000, -1, -2, -5, -30_000):
        assert not experts.holds(torch.tensor([[0, 1], [number, 2]]))


@pytest.mark.parametrize("backend", ALL)
def test_shards_that_came_one_by_one_compute_what_the_family_does(backend):
    whole = make_experts(bias=True)
    experts = HeldExperts(E)
    for ids in ((4, 1), (0, 5, 2), (3,)):
        part = make_experts(bias=True, num_experts=len(ids))
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                parameter.copy_(dict(whole.named_parameters())[name][list(ids)])
        shard = ExpertShard(part, layer=0, expert_ids=ids, backend=backend)
        shard.pack()
        experts.add(shard)
    rows_RD, index_RK, weights_RK = rows_of(23, 3)
    with torch.inference_mode():
        got_RD = experts.compute(rows_RD, index_RK, weights_RK)
    assert got_RD.shape == (23, D)
    assert_close(backend, got_RD, own(whole, rows_RD, index_RK, weights_RK))
