"""Who adopts orphans: by hand, and for any orphans, survivors and room."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.placement.adoption import Survivor, plan_adoption

PLENTY = {"pool": 1e9}


def survivor(*held, pool="pool", each=10):
    """A survivor that holds so many experts of layers 0, 1, ...; each takes so many bytes."""
    return Survivor(pool, dict(enumerate(held)), dict.fromkeys(range(len(held)), each))


# By hand.


def test_orphans_go_to_whoever_holds_fewest_of_their_layer():
    survivors = {0: survivor(4, 1), 1: survivor(2, 3)}
    adopted, left_over = plan_adoption(
        {0: [5, 6, 7], 1: [2, 3]}, survivors, room_bytes={"pool": 1000}
    )
    # Layer 0: slot 1 until both hold 4; then they are alike, and the lower number is taken.
    assert adopted == {0: {0: [7], 1: [2, 3]}, 1: {0: [5, 6]}}
    assert left_over == {}


def test_survivors_that_are_alike_share_evenly():
    survivors = {slot: survivor(2) for slot in (0, 2, 3)}
    adopted, _ = plan_adoption({0: [0, 1, 2, 3, 4]}, survivors, room_bytes=PLENTY)
    assert adopted == {0: {0: [0, 3]}, 2: {0: [1, 4]}, 3: {0: [2]}}


def test_of_those_that_hold_the_same_the_one_with_more_room_is_first():
    survivors = {0: survivor(1, pool="small"), 1: survivor(1, pool="large")}
    adopted, _ = plan_adoption({0: [4]}, survivors, room_bytes={"small": 10, "large": 11})
    assert adopted == {1: {0: [4]}}


def test_who_has_no_room_is_passed_over():
    survivors = {0: survivor(0, pool="small"), 1: survivor(9, pool="large")}
    adopted, left_over = plan_adoption(
        {0: [1, 2, 3]}, survivors, room_bytes={"small": 19, "large": 1000}
    )
    assert adopted == {0: {0: [1]}, 1: {0: [2, 3]}}
    assert left_over == {}


def test_survivors_of_one_pool_share_its_room():
    survivors = {0: survivor(0), 1: survivor(0)}
    adopted, left_over = plan_adoption({0: [1, 2, 3, 4]}, survivors, room_bytes={"pool": 35})
    assert adopted == {0: {0: [1, 3]}, 1: {0: [2]}}
    assert left_over == {0: [4]}


def test_room_to_the_byte():
    for room, fits in ((29, 2), (30, 3)):
        adopted, left_over = plan_adoption(
            {0: [1, 2, 3]}, {0: survivor(0)}, room_bytes={"pool": room}
        )
        assert len(adopted[0][0]) == fits
        assert sum(map(len, left_over.values())) == 3 - fits


def test_a_smaller_expert_of_a_later_layer_still_fits():
    one = {0: Survivor("pool", {0: 0, 1: 0}, {0: 100, 1: 10})}
    adopted, left_over = plan_adoption({0: [3], 1: [4]}, one, room_bytes={"pool": 50})
    assert (adopted, left_over) == ({0: {1: [4]}}, {0: [3]})


def test_an_expert_takes_other_bytes_on_another_worker():
    survivors = {
        0: Survivor("a", {0: 0}, {0: 40}),  # as it is
        1: Survivor("b", {0: 7}, {0: 10}),  # int8
    }
    adopted, left_over = plan_adoption({0: [1, 2]}, survivors, room_bytes={"a": 39, "b": 20})
    assert (adopted, left_over) == ({1: {0: [1, 2]}}, {})


def test_nobody_is_left():
    assert plan_adoption({0: [1], 2: [0, 3]}, {}, room_bytes={}) == ({}, {0: [1], 2: [0, 3]})


def test_nothing_is_to_be_done():
    assert plan_adoption({}, {0: survivor(2)}, room_bytes=PLENTY) == ({}, {})


def test_the_arguments_stay_as_they_are():
    room, held = {"pool": 100.0}, {0: 1}
    plan_adoption({0: [1, 2]}, {0: Survivor("pool", held, {0: 10})}, room_bytes=room)
    assert (room, held) == ({"pool": 100.0}, {0: 1})


# Any losses.


@st.composite
def losses(draw):
    layers = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True))
    orphans = {
        layer: sorted(draw(st.sets(st.integers(0, 11), min_size=1, max_size=6))) for layer in layers
    }
    pools = ("a", "b", "c")
    sizes = st.integers(1, 30)
    survivors = {
        slot: Survivor(
            draw(st.sampled_from(pools)),
            {layer: draw(st.integers(0, 5)) for layer in layers},
            {layer: draw(sizes) for layer in layers},
        )
        for slot in draw(st.sets(st.integers(0, 6), max_size=4))
    }
    return orphans, survivors, {pool: draw(st.integers(0, 120)) for pool in pools}


@settings(deadline=None, max_examples=300)
@given(losses())
def test_every_orphan_is_adopted_once_or_left_over_and_no_pool_takes_more_than_it_has(case):
    orphans, survivors, room = case
    adopted, left_over = plan_adoption(orphans, survivors, room_bytes=room)
    assert adopted.keys() <= survivors.keys()
    dealt = [
        (layer, expert)
        for by_layer in (left_over, *adopted.values())
        for layer, experts in by_layer.items()
        for expert in experts
    ]
    assert sorted(dealt) == [(n, e) for n in sorted(orphans) for e in orphans[n]]
    taken = dict.fromkeys(room, 0)
    for slot, by_layer in adopted.items():
        for layer, experts in by_layer.items():
            taken[survivors[slot].pool] += len(experts) * survivors[slot].expert_bytes[layer]
    assert all(taken[pool] <= room[pool] for pool in room)
    for layer in left_over:
        for each in survivors.values():
            left = room[each.pool] - taken[each.pool]
            assert left < each.expert_bytes[layer], "there was room"


@settings(deadline=None)
@given(losses())
def test_with_room_for_all_no_layer_is_fuller_than_it_must_be(case):
    """No survivor ends up with more of a layer than another would have with that expert added."""
    orphans, survivors, _ = case
    adopted, left_over = plan_adoption(orphans, survivors, room_bytes=dict.fromkeys("abc", 1e9))
    assert bool(left_over) == (not survivors)
    for layer in orphans:
        now = {
            slot: each.num_held[layer] + len(adopted.get(slot, {}).get(layer, ()))
            for slot, each in survivors.items()
        }
        took = [now[slot] for slot in survivors if adopted.get(slot, {}).get(layer)]
        assert max(took, default=0) <= min(now.values(), default=0) + 1


@pytest.mark.parametrize("room", [25, 10**6])
@pytest.mark.parametrize("num_survivors", [1, 2, 3])
def test_the_same_loss_is_answered_the_same_way(num_survivors, room):
    survivors = {slot: survivor(3, 3) for slot in range(num_survivors)}
    orphans = {1: [4, 2], 0: [1, 0, 7]}
    first = plan_adoption(orphans, survivors, room_bytes={"pool": room})
    again = plan_adoption(
        dict(reversed(orphans.items())),
        dict(reversed(survivors.items())),
        room_bytes={"pool": room},
    )
    assert first == again
