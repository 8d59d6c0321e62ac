"""Will the weights fit? Answered from sizes alone, before anything is loaded."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_lightning.errors import UsageError
from moe_lightning.placement.placement import ExpertPlacement

_GB = 1e9


@dataclass(frozen=True)
class Capacity:
    """What the policies must keep within.

    Args:
        free_bytes: Bytes that the experts of each slot may take, over all layers; infinity where
            there is no limit.
        expert_bytes: Bytes of one expert of each MoE layer.
        slot_names: How the user calls each slot, for messages; none means by number.
        more_room: What a user can do about too little room, for messages.
    """

    free_bytes: tuple[float, ...]
    expert_bytes: Mapping[int, int]
    slot_names: tuple[str, ...] = ()
    more_room: str = "Name more or other slots (cpu may be one)"

    @classmethod
    def of_devices(
        cls,
        device_of_slot: Sequence[str],
        *,
        free_bytes: Mapping[str, int],
        expert_bytes: Mapping[int, int],
        dense_bytes: int,
        home: str,
        reserve_bytes: int = 0,
        slot_names: Sequence[str] = (),
        more_room: str = more_room,
    ) -> "Capacity":
        """Return the capacity of slots on devices: slots of one device share what is free equally.

        Args:
            device_of_slot: The device of each slot.
            free_bytes: Free bytes of each device.
            expert_bytes: Bytes of one expert of each MoE layer.
            dense_bytes: Bytes of the router and the dense layers.
            home: The device that holds these; it need not be one of the slots'.
            reserve_bytes: Bytes of each device to leave free, for activations and caches.
            slot_names: How the user calls each slot, for messages.
            more_room: What a user can do about too little room, for messages.
        """
        num_slots = Counter(device_of_slot)
        room = {device: float(free_bytes[device] - reserve_bytes) for device in num_slots}
        if home in room:
            room[home] -= dense_bytes
        shares = (max(0.0, room[device]) / num_slots[device] for device in device_of_slot)
        return cls(tuple(shares), expert_bytes, tuple(slot_names), more_room)


def needed_bytes(
    placement: ExpertPlacement,
    *,
    expert_bytes: Mapping[int, int],
    dense_bytes: int,
    home: str,
    device_of_slot: Sequence[str],
) -> dict[str, int]:
    """Return the bytes of weights that each device holds under a placement.

    Args:
        placement: The placement; it may know fewer slots than there are.
        expert_bytes: Bytes of one expert of each MoE layer.
        dense_bytes: Bytes of the router and the dense layers.
        home: The device that holds these.
        device_of_slot: The device of each slot; several slots may share one.

    Returns:
        The bytes of each device: home, then in the order of the slots.
    """
    assert placement.num_slots <= len(device_of_slot), "ExpertPlacement.check comes first"
    needed = dict.fromkeys((home, *device_of_slot), 0)
    needed[home] += dense_bytes
    for layer, experts in placement.slots.items():
        for slots in experts:
            for slot in slots:
                needed[device_of_slot[slot]] += expert_bytes[layer]
    return needed


def check_memory(
    placement: ExpertPlacement,
    *,
    expert_bytes: Mapping[int, int],
    dense_bytes: int,
    home: str,
    slot_names: Sequence[str],
    device_of_slot: Sequence[str],
    free_bytes: Mapping[str, int],
    reserve_bytes: int = 0,
    more_room: str,
) -> dict[str, int]:
    """Check that every device has room for what a placement puts on it.

    Args:
        placement: The placement.
        expert_bytes: Bytes of one expert of each MoE layer.
        dense_bytes: Bytes of the router and the dense layers.
        home: The device that holds these.
        slot_names: How the user calls each slot.
        device_of_slot: The device of each slot; several slots may share one.
        free_bytes: Free bytes of each device.
        reserve_bytes: Bytes of each device to leave free, for activations and caches.
        more_room: What a user can do about too little room.

    Returns:
        The bytes of weights that each device is going to hold.

    Raises:
        UsageError: If a device has less room; the message is a table of all devices.
    """
    needed = needed_bytes(
        placement,
        expert_bytes=expert_bytes,
        dense_bytes=dense_bytes,
        home=home,
        device_of_slot=device_of_slot,
    )
    room = {device: free_bytes[device] - reserve_bytes for device in needed}
    if all(needed[device] <= room[device] for device in needed):
        return needed
    width = max(len("device"), *map(len, needed))
    lines = [f"  {'device':<{width}}  needed GB    free GB  slots"]
    for device, num_bytes in needed.items():
        names = [name for name, at in zip(slot_names, device_of_slot, strict=True) if at == device]
        over = f"  ◀ {(num_bytes - room[device]) / _GB:.3f} GB too much"
        lines.append(
            f"  {device:<{width}}  {num_bytes / _GB:9.3f}  {free_bytes[device] / _GB:9.3f}  "
            f"{', '.join(names)}{over if num_bytes > room[device] else ''}"
        )
    kept = f" {reserve_bytes / _GB:.3f} GB of each device are kept free." if reserve_bytes else ""
    raise UsageError(
        "The weights do not fit where the placement puts them; nothing was loaded.\n"
        + "\n".join(lines)
        + f"\n{home} also holds the router and the dense layers, "
        f"{dense_bytes / _GB:.3f} GB.{kept}\n{more_room}, use another policy or placement, or make "
        "the weights smaller: "
        "--model.dtype bfloat16, and on the CPU --model.experts_backend cpu_half or cpu_int8."
    )
