import doctest
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moe_lightning.placement.policies as policies_module
from moe_lightning.errors import UsageError
from moe_lightning.placement import (
    Capacity,
    ExpertPlacement,
    balanced,
    imbalance,
    linear,
    make_placement,
    round_robin,
)

LOADS = st.one_of(st.just(0.0), st.integers(0, 50).map(float), st.floats(0, 1e6))


def as_lists(placement: ExpertPlacement) -> dict[int, list[list[int]]]:
    return {layer: [list(slots) for slots in experts] for layer, experts in placement.slots.items()}


def first_slots(placement: ExpertPlacement) -> dict[int, list[int]]:
    assert placement.num_replicas == 0
    return {layer: [slots[0] for slots in experts] for layer, experts in placement.slots.items()}


def num_on_slots(placement: ExpertPlacement) -> list[int]:
    """Experts on each slot, counted without the placement's methods."""
    copies = [s for experts in placement.slots.values() for slots in experts for s in slots]
    return np.bincount(copies, minlength=placement.num_slots).tolist()


def bytes_on_slots(placement: ExpertPlacement, expert_bytes: dict[int, int]) -> list[int]:
    used = [0] * placement.num_slots
    for layer, experts in placement.slots.items():
        for slot in (slot for slots in experts for slot in slots):
            used[slot] += expert_bytes[layer]
    return used


def test_docstring_examples() -> None:
    result = doctest.testmod(policies_module)
    assert result.attempted == 2
    assert result.failed == 0


def test_linear_gives_blocks_and_spreads_the_remainders() -> None:
    assert first_slots(linear({0: 6, 2: 6, 3: 6}, 4)) == {
        0: [0, 0, 1, 1, 2, 3],
        2: [0, 1, 2, 2, 3, 3],
        3: [0, 0, 1, 1, 2, 3],
    }
    assert first_slots(linear({0: 5, 1: 5}, 2)) == {0: [0, 0, 0, 1, 1], 1: [0, 0, 1, 1, 1]}


def test_fewer_experts_than_slots() -> None:
    assert first_slots(linear({0: 2, 1: 2}, 5)) == {0: [0, 1], 1: [2, 3]}
    assert first_slots(round_robin({0: 2}, 5)) == {0: [0, 1]}
    assert first_slots(balanced({0: 2}, 5, loads={0: [1, 2]})) == {0: [1, 0]}


def test_round_robin() -> None:
    assert first_slots(round_robin({1: 5, 2: 3}, 3)) == {1: [0, 1, 2, 0, 1], 2: [0, 1, 2]}


def test_no_layers() -> None:
    assert (
        linear({}, 2) == round_robin({}, 2) == balanced({}, 2, loads={}) == ExpertPlacement(2, {})
    )


def test_small_slot_gets_fewer_of_every_layer() -> None:
    # 16 experts of 10 bytes; slot 0 has room for 4 of them: one of each layer's four.
    num_experts = dict.fromkeys(range(4), 4)
    capacity = Capacity((40.0, 1000.0), dict.fromkeys(range(4), 10))
    assert first_slots(linear(num_experts, 2, capacity=capacity)) == {
        layer: [0, 1, 1, 1] for layer in range(4)
    }
    assert first_slots(round_robin(num_experts, 2, capacity=capacity)) == {
        layer: [0, 1, 1, 1] for layer in range(4)
    }
    loads = {layer: [1.0, 1.0, 1.0, 9.0] for layer in range(4)}
    assert first_slots(balanced(num_experts, 2, loads=loads, capacity=capacity)) == {
        layer: [1, 1, 1, 0] for layer in range(4)
    }


def test_plenty_of_room_changes_nothing() -> None:
    num_experts = {0: 7, 1: 9, 5: 7}
    capacity = Capacity((1e9, 2e9, float("inf")), dict.fromkeys(num_experts, 10))
    loads = {layer: [float(e * e % 7) for e in range(n)] for layer, n in num_experts.items()}
    assert linear(num_experts, 3, capacity=capacity) == linear(num_experts, 3)
    assert round_robin(num_experts, 3, capacity=capacity) == round_robin(num_experts, 3)
    assert balanced(num_experts, 3, loads=loads, capacity=capacity) == balanced(
        num_experts, 3, loads=loads
    )


def test_slot_without_room_stays_empty() -> None:
    capacity = Capacity((-5.0, 60.0, 0.0, 20.0), {0: 10})
    assert first_slots(linear({0: 8}, 4, capacity=capacity)) == {0: [1] * 6 + [3] * 2}
    assert first_slots(round_robin({0: 8}, 4, capacity=capacity)) == {0: [1, 1, 3, 3, 1, 1, 1, 1]}


@pytest.mark.parametrize("policy", ["linear", "round_robin", "balanced"])
def test_too_little_room_is_said_with_the_numbers(policy: Any) -> None:
    capacity = Capacity((3e9, 1.5e9), {0: 10**9, 1: 10**9})
    with pytest.raises(UsageError) as error:
        make_placement(policy, {0: 3, 1: 2}, 2, loads={0: [1, 2, 3], 1: [1, 2]}, capacity=capacity)
    message = str(error.value)
    assert "5 of them" in message
    assert "need 5.000 GB" in message
    assert "slot 0 3.000 GB, slot 1 1.500 GB" in message
    assert "dtype bfloat16" in message


def test_largest_experts_find_room_first() -> None:
    # Layer 1's expert of 30 bytes fits on slot 0 only while layer 0's are not there.
    capacity = Capacity((30.0, 20.0), {0: 10, 1: 30})
    assert first_slots(linear({0: 2, 1: 1}, 2, capacity=capacity)) == {0: [1, 1], 1: [0]}


def test_replicas_go_to_the_highest_load_per_copy() -> None:
    # 12 -> 6 6; 8 -> 4 4; 6 is the highest again: 12 -> 4 4 4; of equal ones, that with fewest.
    loads = {0: [12.0, 8.0, 1.0]}
    num_copies = [
        [len(slots) for slots in as_lists(balanced({0: 3}, 4, loads=loads, num_replicas=n))[0]]
        for n in range(5)
    ]
    assert num_copies == [[1, 1, 1], [2, 1, 1], [2, 2, 1], [3, 2, 1], [3, 3, 1]]


def test_replicas_end_when_every_slot_holds_the_expert() -> None:
    placement = balanced({0: 2}, 2, loads={0: [5.0, 1.0]}, num_replicas=100)
    assert as_lists(placement) == {0: [[0, 1], [0, 1]]}


def test_replicas_without_load_are_spread() -> None:
    placement = balanced({0: 4}, 3, loads={0: [0.0] * 4}, num_replicas=2)
    assert as_lists(placement) == {0: [[0, 1], [0, 2], [1], [2]]}


def test_replicas_that_do_not_fit() -> None:
    capacity = Capacity((30.0, 0.0), {0: 10})
    with pytest.raises(UsageError, match=r"copies of one expert on different slots.*fewer replic"):
        balanced({0: 2}, 2, loads={0: [5.0, 1.0]}, num_replicas=1, capacity=capacity)


def test_fast_slot_gets_more_load() -> None:
    # One slot three times as fast: 9 of the 12 equal experts.
    placement = balanced({0: 12}, 2, loads={0: [1.0] * 12}, slot_speeds=[1.0, 3.0])
    assert num_on_slots(placement) == [3, 9]
    # And the same where nothing was recorded.
    placement = balanced({0: 12}, 2, loads={0: [0.0] * 12}, slot_speeds=[1.0, 3.0])
    assert num_on_slots(placement) == [3, 9]
    # One large expert belongs on the fast slot, whatever its number.
    assert first_slots(balanced({0: 1}, 2, loads={0: [4]}, slot_speeds=[1.0, 3.0])) == {0: [1]}


def test_slots_are_equally_full_under_skewed_loads() -> None:
    # One expert of each layer has most rows and gets a slot of its own; the slots take turns.
    loads = {layer: [100.0] + [1.0] * 7 for layer in range(6)}
    placement = balanced(dict.fromkeys(range(6), 8), 2, loads=loads)
    assert num_on_slots(placement) == [24, 24]
    # max / mean: 100 and 7 rows on the two slots.
    assert imbalance(placement, loads) == {layer: 100 / 53.5 for layer in range(6)}


@given(st.integers(1, 12), st.integers(1, 7), st.integers(1, 8), st.sampled_from([0.0, 1.0, 0.1]))
def test_slots_are_equally_full_under_equal_loads(
    num_experts: int, num_slots: int, num_layers: int, load: float
) -> None:
    sizes = dict.fromkeys(range(num_layers), num_experts)
    loads = {layer: [load] * num_experts for layer in sizes}
    for placement in (linear(sizes, num_slots), balanced(sizes, num_slots, loads=loads)):
        on_slots = num_on_slots(placement)
        assert max(on_slots) - min(on_slots) <= 1
        for layer in sizes:
            in_layer = [len(placement.experts_of(slot, layer)) for slot in range(num_slots)]
            assert max(in_layer) - min(in_layer) <= 1


@given(st.dictionaries(st.integers(0, 9), st.integers(1, 12), max_size=5), st.integers(1, 6))
def test_linear_blocks_are_contiguous(num_experts: dict[int, int], num_slots: int) -> None:
    placement = linear(num_experts, num_slots)
    assert {layer: len(slots) for layer, slots in placement.slots.items()} == num_experts
    for slots in first_slots(placement).values():
        assert slots == sorted(slots)


@given(st.data())
def test_copies_are_all_placed_and_within_the_capacity(data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, 5))
    num_experts = data.draw(
        st.dictionaries(st.integers(0, 9), st.integers(1, 8), min_size=1, max_size=4)
    )
    num_replicas = data.draw(st.integers(0, 5))
    loads = {
        layer: data.draw(st.lists(LOADS, min_size=n, max_size=n))
        for layer, n in num_experts.items()
    }
    speeds = data.draw(
        st.none() | st.lists(st.sampled_from([1.0, 2.5]), min_size=num_slots, max_size=num_slots)
    )
    expert_bytes = dict.fromkeys(num_experts, 10)
    free = data.draw(st.lists(st.integers(-10, 300), min_size=num_slots, max_size=num_slots))
    capacity = Capacity(tuple(float(n) for n in free), expert_bytes)
    places = sum(max(0, n) // 10 for n in free)

    for policy in ("linear", "round_robin", "balanced"):
        replicas = num_replicas if policy == "balanced" else 0
        expected = sum(n + min(replicas, n * (num_slots - 1)) for n in num_experts.values())

        def make(
            policy: Any = policy, replicas: int = replicas, capacity: Capacity | None = capacity
        ) -> ExpertPlacement:
            return make_placement(
                policy,
                num_experts,
                num_slots,
                loads=loads,
                num_replicas=replicas,
                slot_speeds=speeds,
                capacity=capacity,
            )

        assert sum(num_on_slots(make(capacity=None))) == expected
        try:
            placement = make()
        except UsageError:
            # Experts of one size fit exactly when there are as many places. Replicas need
            # different slots besides.
            assert expected > places or replicas
            continue
        assert placement == make()
        placement.check(num_experts, num_slots)  # its constructor refuses an expert twice on a slot
        assert sum(num_on_slots(placement)) == expected
        for used, room in zip(bytes_on_slots(placement, expert_bytes), free, strict=True):
            assert used <= max(0, room)


@given(st.lists(LOADS, min_size=1, max_size=7), st.integers(1, 3))
def test_balanced_is_within_four_thirds_of_the_optimum(loads: list[float], num_slots: int) -> None:
    slots = first_slots(balanced({0: len(loads)}, num_slots, loads={0: loads}))[0]
    best = min(
        np.bincount(choice, weights=loads, minlength=num_slots).max()
        for choice in product(range(num_slots), repeat=len(loads))
    )
    # Graham 1969: longest processing time first.
    bound = 4 / 3 - 1 / (3 * num_slots)
    busiest = np.bincount(slots, weights=loads, minlength=num_slots).max()
    assert busiest <= bound * best * (1 + 1e-9)


@given(st.lists(LOADS, min_size=1, max_size=60), st.integers(1, 8))
def test_balanced_is_near_mean_or_largest_load(loads: list[float], num_slots: int) -> None:
    slots = first_slots(balanced({0: len(loads)}, num_slots, loads={0: loads}))[0]
    busiest = np.bincount(slots, weights=loads, minlength=num_slots).max()
    # Graham 1966: the last expert of the busiest slot went to the least loaded one.
    mean = sum(loads) / num_slots
    assert busiest <= (mean + (1 - 1 / num_slots) * max(loads)) * (1 + 1e-9)


def test_make_placement_knows_what_is_missing() -> None:
    with pytest.raises(UsageError, match=r"no loads to balance by.*routing_balance.json"):
        make_placement("balanced", {0: 2}, 2)
    with pytest.raises(UsageError, match=r"'best'\. Use linear, round_robin or balanced"):
        make_placement("best", {0: 2}, 2)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="num_replicas=1, but the policy linear"):
        make_placement("linear", {0: 2}, 2, num_replicas=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loads": {0: [1.0]}}, "loads of 1 experts in layer 0, but the model has 2"),
        ({"loads": {}}, "the model, but not the loads, has layer 0"),
        ({"loads": {0: [1, 1], 3: [1, 1]}}, "the loads have layer 3"),
        ({"loads": {0: [1.0, float("nan")]}}, "layer 0, expert 1: the load is nan"),
        ({"loads": {0: [-1.0, 1.0]}}, "layer 0, expert 0: the load is -1.0"),
        ({"num_replicas": -1}, "num_replicas=-1"),
        ({"slot_speeds": [1.0]}, "2 numbers above 0"),
        ({"slot_speeds": [1.0, 0.0]}, "2 numbers above 0"),
    ],
)
def test_balanced_refuses_wrong_numbers(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        balanced({0: 2}, 2, **{"loads": {0: [1.0, 1.0]}, **settings})


@pytest.mark.parametrize("policy", [linear, round_robin])
def test_no_slots(policy: Any) -> None:
    with pytest.raises(UsageError, match="num_slots=0"):
        policy({0: 2}, 0)
