"""Which rows go to which slot: by hand, and for any placement and routing."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.dispatch.plan import SELECT_TOKENS, LayerRoutes, even_out

CPU = torch.device("cpu")
PICKS_ROWS = {"rows picked": 0, "all rows to every slot": 10**9}


def routes(experts_of_slot, num_experts, *, device=CPU, **options):
    return LayerRoutes(num_experts, experts_of_slot, device=device, **options)


def shares_of(experts_of_slot, index, **options):
    """Shares of a routing given as lists; pair (t, k) has the weight t + k / 10."""
    index_TK = torch.tensor(index)
    num_experts = 1 + max(max(experts) for experts in experts_of_slot.values())
    layer = routes(experts_of_slot, num_experts, **options)
    shares = layer.shares(index_TK, weights_for(index_TK))
    return {share.slot: share for share in shares}


def weights_for(index_TK):
    num_tokens, top_k = index_TK.shape
    return torch.arange(num_tokens)[:, None] + torch.arange(top_k) / 10


def as_lists(share):
    return (
        None if share.token_R is None else share.token_R.tolist(),
        share.index_RK.tolist(),
        share.weights_RK.tolist(),
    )


# Shares, by hand. Slot 0 holds experts 0 and 2, slot 1 experts 3 and 1, in this order.

TWO_SLOTS = {0: (0, 2), 1: (3, 1)}


def test_a_row_goes_once_to_each_slot_that_holds_any_of_its_experts():
    shares = shares_of(TWO_SLOTS, [[0, 2], [1, 3], [2, 1]])
    # Local numbers; 2, the number of experts on either slot, stands for elsewhere.
    tokens, index, weights = as_lists(shares[0])
    assert (tokens, index) == ([0, 2], [[0, 1], [1, 2]])
    assert weights == [pytest.approx([0.0, 0.1]), pytest.approx([2.0, 2.1])]
    tokens, index, weights = as_lists(shares[1])
    assert (tokens, index) == ([1, 2], [[1, 0], [2, 1]])
    assert weights == [pytest.approx([1.0, 1.1]), pytest.approx([2.0, 2.1])]


def test_a_slot_that_takes_every_row_is_given_them_as_they_are():
    shares = shares_of(TWO_SLOTS, [[0, 1], [2, 3], [2, 0]])
    assert shares[0].token_R is None
    assert shares[0].index_RK.tolist() == [[0, 2], [1, 2], [1, 0]]
    assert shares[1].token_R.tolist() == [0, 1]


def test_a_slot_without_rows_is_left_out():
    assert list(shares_of(TWO_SLOTS, [[0, 2], [2, 0]])) == [0]
    assert list(shares_of(TWO_SLOTS, [[3, 1], [1, 3]])) == [1]


def test_slots_of_different_sizes_have_different_numbers_for_elsewhere():
    shares = shares_of({1: (0, 1, 2), 4: (3,)}, [[0, 3]])
    assert list(shares) == [1, 4]
    assert shares[1].index_RK.tolist() == [[0, 3]]
    assert shares[4].index_RK.tolist() == [[1, 0]]


def test_shares_come_in_the_order_of_the_slots():
    layer = routes({2: (0,), 0: (1,), 1: (2,)}, 3)
    shares = layer.shares(torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
    assert [share.slot for share in shares] == [0, 1, 2]


def test_an_expert_on_no_slot_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="every expert"):
        routes({0: (0, 2)}, 3)


def test_experts_may_be_named_as_the_checkpoint_does():
    shares = shares_of(TWO_SLOTS, [[0, 2], [1, 3], [2, 1]], numbering="logical")
    # 4, the number of experts of the layer, stands for elsewhere.
    assert as_lists(shares[0])[:2] == ([0, 2], [[0, 2], [2, 4]])
    assert as_lists(shares[1])[:2] == ([1, 2], [[1, 3], [4, 1]])
    whole = shares_of({2: (3, 1, 0, 2)}, [[0, 3], [2, 1]], numbering="logical")
    assert as_lists(whole[2])[:2] == (None, [[0, 3], [2, 1]])


# Pairs that are computed nowhere: those of a share, when it is split again.

NOWHERE = 4


@pytest.mark.parametrize(("numbering", "elsewhere"), [("local", 2), ("logical", 4)])
def test_a_pair_that_is_computed_nowhere_is_on_no_slot(numbering, elsewhere):
    index = [[0, NOWHERE], [NOWHERE, 3], [NOWHERE, NOWHERE]]
    shares = shares_of(TWO_SLOTS, index, numbering=numbering)
    three = {"local": 0, "logical": 3}[numbering]
    assert as_lists(shares[0])[:2] == ([0], [[0, elsewhere]])
    assert as_lists(shares[1])[:2] == ([1], [[elsewhere, three]])
    assert shares_of(TWO_SLOTS, [[NOWHERE, NOWHERE]], numbering=numbering) == {}


def test_a_pair_that_is_computed_nowhere_is_nobodys_load():
    # Expert 0 is on both slots; slot 1 has expert 2's two rows, so it goes to slot 0 both times.
    index = [[0, 2], [3, 2], [0, 3], [3, 3]]
    shares = shares_of({0: (0, 1), 1: (0, 2)}, index)
    assert as_lists(shares[0])[:2] == ([0, 2], [[0, 2], [0, 2]])
    assert as_lists(shares[1])[:2] == ([0, 1], [[2, 1], [2, 1]])


def test_a_share_can_be_split_again():
    """As it is when the slot that it went to is lost."""
    lost = shares_of({0: (0, 2), 1: (1, 3)}, [[0, 1], [3, 2]], numbering="logical")[1]
    assert lost.index_RK.tolist() == [[4, 1], [3, 4]]
    after = routes({0: (0, 1, 2), 2: (3,)}, 4, numbering="logical")
    shares = {share.slot: share for share in after.shares(lost.index_RK, lost.weights_RK)}
    assert as_lists(shares[0])[:2] == ([0], [[4, 1]])
    assert shares[0].weights_RK.tolist() == [pytest.approx([0.0, 0.1])]
    assert as_lists(shares[2])[:2] == ([1], [[3, 4]])
    assert shares[2].weights_RK.tolist() == [pytest.approx([1.0, 1.1])]


# Replicas.


def test_replicas_take_the_rows_that_even_out_the_slots():
    # Expert 1, only on slot 0, has 3 rows. Of the 5 rows of expert 0, 1 and 4 make it 4 and 4.
    shares = shares_of({0: (0, 1), 1: (0,)}, [[0], [1], [0], [1], [0], [0], [1], [0]])
    assert shares[0].token_R.tolist() == [0, 1, 3, 6]
    assert shares[0].index_RK.tolist() == [[0], [1], [1], [1]]
    assert shares[1].token_R.tolist() == [2, 4, 5, 7]
    assert shares[1].index_RK.tolist() == [[0]] * 4


def test_the_replicated_expert_with_most_rows_goes_first():
    # Expert 2 (4 rows) is split 2, 2 over slots 0 and 1; expert 0 (2 rows, slots 1 and 2) then goes
    # to the empty slot 2. In the other order, 1 and 1 of expert 0 would go to slots 1 and 2.
    shares = shares_of({0: (1, 2), 1: (0, 2), 2: (0,)}, [[2], [2], [0], [2], [2], [0]])
    assert {slot: share.token_R.tolist() for slot, share in shares.items()} == {
        0: [0, 1],
        1: [3, 4],
        2: [2, 5],
    }


def test_replicas_on_a_device_take_turns_while_rows_are_few():
    layer = routes({0: (0, 1), 1: (0, 2), 3: (0, 1)}, 3, select_tokens=10**9)
    index_TK = torch.tensor([[0, 1], [0, 2], [1, 0], [1, 0], [0, 1]])
    # By the token's number, expert 0 is on slots 0, 1, 3, 0, 1; expert 1 on slots 0, 3, 0, 3, 0.
    assert layer._fixed_slots(index_TK).tolist() == [[0, 0], [1, 1], [0, 3], [3, 0], [1, 0]]
    shares = {share.slot: share for share in layer.shares(index_TK, weights_for(index_TK))}
    assert all(share.token_R is None for share in shares.values())
    assert shares[0].index_RK.tolist() == [[0, 1], [2, 2], [1, 2], [2, 0], [2, 1]]
    assert shares[1].index_RK.tolist() == [[2, 2], [0, 1], [2, 2], [2, 2], [0, 2]]
    assert shares[3].index_RK.tolist() == [[2, 2], [2, 2], [2, 0], [1, 2], [2, 2]]


def test_few_rows_are_planned_without_reading_anything_from_their_device():
    """Tensors on meta have no values: whoever read one would get an error."""
    meta = torch.device("meta")
    layer = routes({0: (0, 1), 1: (1, 2)}, 3, device=meta)
    few = torch.empty(SELECT_TOKENS - 1, 2, dtype=torch.int64, device=meta)
    shares = layer.shares(few, few.float())
    assert [(share.slot, share.token_R, share.index_RK.shape) for share in shares] == [
        (0, None, few.shape),
        (1, None, few.shape),
    ]
    many = torch.empty(SELECT_TOKENS, 2, dtype=torch.int64, device=meta)
    with pytest.raises(NotImplementedError, match="bincount"):
        layer.shares(many, many.float())


# Any placement, any routing.


@st.composite
def placed_routings(draw):
    """Experts of each slot, in any order, and a routing of distinct experts per token, some of
    whose pairs are computed nowhere."""
    num_experts = draw(st.integers(1, 6))
    num_slots = draw(st.integers(1, 5))
    every_slot = st.sets(st.integers(0, num_slots - 1), min_size=1)
    slots_of = draw(st.lists(every_slot, min_size=num_experts, max_size=num_experts))
    experts_of_slot = {}
    for slot in range(num_slots):
        here = [expert for expert, slots in enumerate(slots_of) if slot in slots]
        if here:
            experts_of_slot[slot] = draw(st.permutations(here))
    top_k = draw(st.integers(1, num_experts))
    token = st.permutations(range(num_experts)).map(lambda experts: experts[:top_k])
    index = draw(st.lists(token, max_size=12))
    index_TK = torch.tensor(index, dtype=torch.int64).view(-1, top_k)
    if draw(st.booleans()):
        pairs = st.lists(st.booleans(), min_size=index_TK.numel(), max_size=index_TK.numel())
        is_nowhere_TK = torch.tensor(draw(pairs), dtype=torch.bool).view_as(index_TK)
        index_TK = index_TK.masked_fill(is_nowhere_TK, num_experts)
    return num_experts, experts_of_slot, index_TK


@pytest.mark.parametrize("numbering", ["local", "logical"])
@pytest.mark.parametrize("select_tokens", PICKS_ROWS.values(), ids=PICKS_ROWS.keys())
@settings(deadline=None, max_examples=75)
@given(case=placed_routings(), is_transposed=st.booleans())
def test_every_pair_is_computed_exactly_once_where_its_expert_is(
    select_tokens, numbering, case, is_transposed
):
    num_experts, experts_of_slot, index_TK = case
    if is_transposed:  # the same values in another order of memory
        index_TK = index_TK.t().contiguous().t()
    layer = routes(experts_of_slot, num_experts, select_tokens=select_tokens, numbering=numbering)
    shares = layer.shares(index_TK, weights_for(index_TK))
    computed = []
    for share in shares:
        experts = experts_of_slot[share.slot]
        names = range(num_experts) if numbering == "logical" else experts
        tokens = range(index_TK.shape[0]) if share.token_R is None else share.token_R.tolist()
        assert len(tokens) == share.index_RK.shape[0] == share.weights_RK.shape[0]
        for token, named, weights in zip(
            tokens, share.index_RK.tolist(), share.weights_RK.tolist(), strict=True
        ):
            here = [k for k, name in enumerate(named) if name != len(names)]
            assert here or select_tokens, "a row came for nothing"
            for k in here:
                assert weights[k] == pytest.approx(token + k / 10)
                assert names[named[k]] in experts
                computed.append((token, k, names[named[k]]))
    assert sorted(computed) == [
        (token, k, expert)
        for token, experts in enumerate(index_TK.tolist())
        for k, expert in enumerate(experts)
        if expert < num_experts
    ]
    again = layer.shares(index_TK, weights_for(index_TK))
    assert [as_lists(share) for share in again] == [as_lists(share) for share in shares]


# Evening out.


@pytest.mark.parametrize(
    ("loads", "num_rows", "parts"),
    [
        ([5, 1, 2], 4, [0, 3, 1]),  # 5, 4, 3
        ([0, 0], 5, [3, 2]),
        ([7], 3, [3]),
        ([9, 0, 0], 4, [0, 2, 2]),
        ([3, 3, 3], 0, [0, 0, 0]),
        ([2, 1], 1, [0, 1]),
    ],
)
def test_even_out_by_hand(loads, num_rows, parts):
    assert even_out(loads, num_rows) == parts


@settings(deadline=None)
@given(loads=st.lists(st.integers(0, 7), min_size=1, max_size=4), num_rows=st.integers(0, 7))
def test_even_out_leaves_the_fullest_bin_as_empty_as_any_split_does(loads, num_rows):
    parts = even_out(loads, num_rows)
    assert len(parts) == len(loads)
    assert sum(parts) == num_rows
    assert all(part >= 0 for part in parts)
    splits = [
        split for split in product(range(num_rows + 1), repeat=len(loads)) if sum(split) == num_rows
    ]

    def fullest(split):
        """Of all bins, and of those that get rows: one full bin must not excuse the others."""
        filled = [load + part for load, part in zip(loads, split, strict=True)]
        given_rows = [f for f, part in zip(filled, split, strict=True) if part]
        return max(filled), max(given_rows, default=0)

    assert fullest(parts)[0] == min(fullest(split)[0] for split in splits)
    assert fullest(parts)[1] == min(fullest(split)[1] for split in splits)
