import pytest

from moe_lightning.errors import UsageError
from moe_lightning.placement import Capacity, ExpertPlacement, check_memory, needed_bytes

GB = 10**9
# Slots 0 and 2 are on one device. Layer 0: experts of 2 GB, layer 1: of 3 GB.
PLACEMENT = ExpertPlacement(3, {0: ((0,), (1,), (0, 2)), 1: ((1,), (2,))})
DEVICES = ["cuda:0", "cpu", "cuda:0"]
EXPERT_BYTES = {0: 2 * GB, 1: 3 * GB}


def test_needed_bytes_of_devices() -> None:
    needed = needed_bytes(
        PLACEMENT, expert_bytes=EXPERT_BYTES, dense_bytes=GB, home="cuda:0", device_of_slot=DEVICES
    )
    # cuda:0: dense 1, slot 0 two of 2, slot 2 one of 2 and one of 3.  cpu: 2 + 3.
    assert needed == {"cuda:0": 10 * GB, "cpu": 5 * GB}


def test_home_may_hold_no_experts() -> None:
    needed = needed_bytes(
        PLACEMENT, expert_bytes=EXPERT_BYTES, dense_bytes=GB, home="here", device_of_slot=DEVICES
    )
    assert needed == {"here": GB, "cuda:0": 9 * GB, "cpu": 5 * GB}


def test_slots_that_the_placement_does_not_know_stay_empty() -> None:
    placement = ExpertPlacement(1, {0: ((0,),)})
    needed = needed_bytes(
        placement,
        expert_bytes={0: 7},
        dense_bytes=1,
        home="cuda:0",
        device_of_slot=["cuda:0", "cuda:1"],
    )
    assert needed == {"cuda:0": 8, "cuda:1": 0}


def check(*, cuda: int, cpu: int, reserve: int = 0) -> dict[str, int]:
    return check_memory(
        PLACEMENT,
        expert_bytes=EXPERT_BYTES,
        dense_bytes=GB,
        home="cuda:0",
        slot_names=["cuda:0", "cpu", "cuda"],
        device_of_slot=DEVICES,
        free_bytes={"cuda:0": cuda, "cpu": cpu, "cuda:1": 0},
        reserve_bytes=reserve,
        more_room="Buy memory",
    )


def test_weights_that_fit_to_the_byte() -> None:
    assert check(cuda=10 * GB, cpu=5 * GB) == {"cuda:0": 10 * GB, "cpu": 5 * GB}
    assert check(cuda=10 * GB + 7, cpu=5 * GB + 7, reserve=7)["cpu"] == 5 * GB


def test_weights_that_do_not_fit_are_shown_in_a_table() -> None:
    with pytest.raises(UsageError) as error:
        check(cuda=9_500_000_000, cpu=64 * GB, reserve=GB // 4)
    lines = str(error.value).splitlines()
    assert lines[1:4] == [
        "  device  needed GB    free GB  slots",
        "  cuda:0     10.000      9.500  cuda:0, cuda  ◀ 0.750 GB too much",
        "  cpu         5.000     64.000  cpu",
    ]
    assert "0.250 GB of each device are kept free" in lines[4]
    assert lines[5].startswith("Buy memory, use another policy")
    assert "--model.dtype bfloat16" in lines[5]
    assert "cpu_int8" in lines[5]


def test_one_byte_too_much() -> None:
    with pytest.raises(UsageError, match="do not fit"):
        check(cuda=10 * GB, cpu=5 * GB - 1)


def test_capacity_of_devices_is_shared_by_their_slots() -> None:
    capacity = Capacity.of_devices(
        ["cuda:0", "cpu", "cuda:0", "cuda:1"],
        free_bytes={"cuda:0": 100, "cpu": 50, "cuda:1": 5},
        expert_bytes={0: 3},
        dense_bytes=20,
        home="cuda:0",
        reserve_bytes=10,
    )
    # cuda:0: (100 - 10 - 20) / 2; cuda:1: 5 - 10, so nothing.
    assert capacity == Capacity((35.0, 40.0, 35.0, 0.0), {0: 3})


def test_capacity_of_devices_that_are_not_home() -> None:
    capacity = Capacity.of_devices(
        ["a", "b"], free_bytes={"a": 100, "b": 50}, expert_bytes={0: 3}, dense_bytes=20, home="c"
    )
    assert capacity == Capacity((100.0, 50.0), {0: 3})
