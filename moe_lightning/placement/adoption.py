"""Who takes over the experts that lost their last holder."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Survivor:
    """A slot that may adopt experts.

    Attributes:
        pool: What memory it uses; slots of one pool share its room.
        num_held: Experts of each layer that it holds.
        expert_bytes: Bytes of one expert of each layer on it.
    """

    pool: str
    num_held: Mapping[int, int]
    expert_bytes: Mapping[int, int]


def plan_adoption(
    orphans: Mapping[int, Sequence[int]],
    survivors: Mapping[int, Survivor],
    *,
    room_bytes: Mapping[str, float],
) -> tuple[dict[int, dict[int, list[int]]], dict[int, list[int]]]:
    """Give orphans to survivors: in each layer to the one that holds fewest, where there is room.

    Args:
        orphans: Experts of each layer that nobody holds.
        survivors: The slots that may adopt.
        room_bytes: Free bytes of each pool.

    Returns:
        For each adopting slot its new experts by layer, and the orphans that no one has room for.
    """
    adopted: dict[int, dict[int, list[int]]] = {}
    left_over: dict[int, list[int]] = {}
    room = dict(room_bytes)
    for layer, experts in sorted(orphans.items()):
        held = Counter({slot: survivor.num_held[layer] for slot, survivor in survivors.items()})
        for expert in experts:
            fitting = [
                slot
                for slot, survivor in survivors.items()
                if room[survivor.pool] >= survivor.expert_bytes[layer]
            ]
            if not fitting:
                left_over.setdefault(layer, []).append(expert)
                continue
            slot = min(fitting, key=lambda s: (held[s], -room[survivors[s].pool], s))
            held[slot] += 1
            room[survivors[slot].pool] -= survivors[slot].expert_bytes[layer]
            adopted.setdefault(slot, {}).setdefault(layer, []).append(expert)
    return adopted, left_over
