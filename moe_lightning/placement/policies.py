"""Policies: ways to choose a placement. Pure functions of numbers; equal input, equal placement."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Literal

from moe_lightning.errors import UsageError
from moe_lightning.placement.filling import Filling
from moe_lightning.placement.loads import check_loads
from moe_lightning.placement.memory import Capacity
from moe_lightning.placement.placement import ExpertPlacement

PolicyName = Literal["linear", "round_robin", "balanced"]


def linear(
    num_experts: Mapping[int, int], num_slots: int, *, capacity: Capacity | None = None
) -> ExpertPlacement:
    """Give each slot a block of neighbouring experts; the blocks' sizes differ by one at most.

    The larger blocks go to the slots with the fewest experts so far, so that over all layers the
    slots are equally full. 5 experts on 2 slots: layer 0 `0 0 0 1 1`, layer 1 `0 0 1 1 1`.

    Args:
        num_experts: Number of experts of each MoE layer.
        num_slots: Number of slots.
        capacity: The room of the slots; a slot with less than an equal share gets what it has room
            for, the same fraction of it in every layer, and the others get the rest. None means no
            limit.

    Returns:
        The placement.

    Raises:
        UsageError: If the experts do not fit.
    """
    filling = Filling(num_experts, num_slots, capacity)
    placed = {}
    for layer in filling.layers():
        for _ in range(num_experts[layer]):
            filling.add(
                min(
                    filling.open_slots(),
                    key=lambda s: (filling.num_in_layer[s], filling.used_bytes[s], s),
                )
            )
        placed[layer] = tuple(
            (slot,) for slot, num in enumerate(filling.num_in_layer) for _ in range(num)
        )
    return ExpertPlacement(num_slots, placed)


def round_robin(
    num_experts: Mapping[int, int], num_slots: int, *, capacity: Capacity | None = None
) -> ExpertPlacement:
    """Give expert e to slot `e % num_slots`, or to the next slot that has room.

    Args:
        num_experts: Number of experts of each MoE layer.
        num_slots: Number of slots.
        capacity: The room of the slots, as for `linear`.

    Returns:
        The placement.

    Raises:
        UsageError: If the experts do not fit.
    """
    filling = Filling(num_experts, num_slots, capacity)
    placed = {}
    for layer in filling.layers():
        slots = []
        for expert in range(num_experts[layer]):
            open_slots = filling.open_slots()
            # The first open slot at or after the expert's own, cyclically.
            own = expert % num_slots
            slots.append(next((s for s in open_slots if s >= own), open_slots[0]))
            filling.add(slots[-1])
        placed[layer] = tuple((slot,) for slot in slots)
    return ExpertPlacement(num_slots, placed)


def balanced(
    num_experts: Mapping[int, int],
    num_slots: int,
    *,
    loads: Mapping[int, Sequence[float]],
    num_replicas: int = 0,
    slot_speeds: Sequence[float] | None = None,
    capacity: Capacity | None = None,
) -> ExpertPlacement:
    """Give each slot the same load in every layer, as nearly as a greedy rule can.

    First the experts with the highest load per copy are replicated, one copy at a time. Then the
    copies, largest load first, go each to the slot that would be done with it first (the rule of
    longest processing time: without replicas, the busiest slot has at most 4/3 of the least
    possible load). Both steps are those of DeepSeek's expert-parallelism load balancer
    (`replicate_experts` and `balanced_packing` in https://github.com/deepseek-ai/EPLB, `eplb.py`),
    but slots may hold different numbers of experts here, and never one expert twice.

    An expert of load 12 beside experts of 1, 4 and 3 on two slots: alone on slot 0 it still is the
    busiest. As two copies of 6, followed by 4 (slot 0: 10), 3 (slot 1: 9) and 1 (slot 1: 10), both
    slots are equally busy.

    >>> balanced({0: 4}, 2, loads={0: [12, 1, 4, 3]}).slots
    {0: ((0,), (1,), (1,), (1,))}
    >>> balanced({0: 4}, 2, loads={0: [12, 1, 4, 3]}, num_replicas=1).slots
    {0: ((0, 1), (1,), (0,), (1,))}

    Experts without load are spread by number. Which of several equal slots gets the most experts
    of a layer changes from layer to layer, so that the slots are about equally full.

    Args:
        num_experts: Number of experts of each MoE layer.
        num_slots: Number of slots.
        loads: The load of each expert of each MoE layer: rows, or anything in proportion to them.
        num_replicas: Number of extra copies in each layer. An expert that is on every slot gets no
            more.
        slot_speeds: How fast each slot is, in any unit; a slot twice as fast gets twice the load.
            None means equally fast.
        capacity: The room of the slots, as for `linear`.

    Returns:
        The placement.

    Raises:
        UsageError: If the loads are another model's, a number is out of range, or the copies do
            not fit.
    """
    check_loads(loads, num_experts)
    speeds = _checked_speeds(slot_speeds, num_slots)
    if num_replicas < 0:
        raise UsageError(f"num_replicas={num_replicas}, but it must be 0 or more.")
    copies = {
        layer: _replicate(loads[layer], num_replicas, max_copies=num_slots) for layer in num_experts
    }
    num_copies = {layer: sum(per_expert) for layer, per_expert in copies.items()}
    filling = Filling(num_copies, num_slots, capacity)
    placed = {}
    for layer in filling.layers():
        holders = _pack(loads[layer], copies[layer], speeds=speeds, filling=filling)
        new_slot = filling.exchange(speeds)
        placed[layer] = tuple(tuple(new_slot[slot] for slot in slots) for slots in holders)
    return ExpertPlacement(num_slots, placed)


def make_placement(
    policy: PolicyName,
    num_experts: Mapping[int, int],
    num_slots: int,
    *,
    loads: Mapping[int, Sequence[float]] | None = None,
    num_replicas: int = 0,
    slot_speeds: Sequence[float] | None = None,
    capacity: Capacity | None = None,
) -> ExpertPlacement:
    """Make a placement by the name of its policy.

    Args:
        policy: `linear`, `round_robin` or `balanced`.
        num_experts: Number of experts of each MoE layer.
        num_slots: Number of slots.
        loads: The load of each expert of each MoE layer; only `balanced` looks at it.
        num_replicas: Number of extra copies in each layer; only `balanced` makes any.
        slot_speeds: How fast each slot is; only `balanced` looks at it.
        capacity: The room of the slots; None means no limit.

    Returns:
        The placement.

    Raises:
        UsageError: If the policy is unknown, lacks its loads, or cannot replicate; and as the
            policy says.
    """
    if policy == "balanced":
        if loads is None:
            raise UsageError(
                "The policy balanced has no loads to balance by. Give it recorded ones (the "
                "routing_balance.json of an earlier run), or use linear or round_robin."
            )
        return balanced(
            num_experts,
            num_slots,
            loads=loads,
            num_replicas=num_replicas,
            slot_speeds=slot_speeds,
            capacity=capacity,
        )
    if policy not in ("linear", "round_robin"):
        raise UsageError(f"Unknown policy {policy!r}. Use linear, round_robin or balanced.")
    if num_replicas:
        raise UsageError(
            f"num_replicas={num_replicas}, but the policy {policy} makes no replicas. Use balanced "
            "with recorded loads, or num_replicas=0."
        )
    make = linear if policy == "linear" else round_robin
    return make(num_experts, num_slots, capacity=capacity)


def _replicate(loads: Sequence[float], num_replicas: int, *, max_copies: int) -> list[int]:
    """Return the number of copies of each expert."""
    copies = [1] * len(loads)
    for _ in range(min(num_replicas, len(loads) * (max_copies - 1))):
        open_experts = [e for e, num in enumerate(copies) if num < max_copies]
        # Without load, the expert with the fewest copies.
        copies[min(open_experts, key=lambda e: (-loads[e] / copies[e], copies[e], e))] += 1
    return copies


def _pack(
    loads: Sequence[float], copies: Sequence[int], *, speeds: Sequence[float], filling: Filling
) -> list[list[int]]:
    """Return the slots of each expert of the filling's current layer."""
    holders: list[list[int]] = [[] for _ in loads]
    slot_loads = [0.0] * len(speeds)
    for expert in sorted(range(len(loads)), key=lambda e: (-loads[e] / copies[e], e)):
        load = loads[expert] / copies[expert]
        for _ in range(copies[expert]):

            def finish(slot: int, load: float = load) -> tuple[float, float, int]:
                # An expert without load is done at once everywhere: its number decides.
                time = (slot_loads[slot] + load) / speeds[slot] if load else 0.0
                return time, (filling.num_in_layer[slot] + 1) / speeds[slot], slot

            slot = min(filling.open_slots(without=holders[expert]), key=finish)
            holders[expert].append(slot)
            slot_loads[slot] += load
            filling.add(slot)
    return holders


def _checked_speeds(slot_speeds: Sequence[float] | None, num_slots: int) -> list[float]:
    speeds = [1.0] * num_slots if slot_speeds is None else list(slot_speeds)
    if len(speeds) != num_slots or not all(isfinite(s) and s > 0 for s in speeds):
        raise UsageError(
            f"slot_speeds={speeds}, but it must be {num_slots} numbers above 0, one for each slot."
        )
    return speeds
