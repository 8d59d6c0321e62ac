"""Filling: the room of the slots while layer after layer is placed. Used by the policies."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from moe_lightning.errors import UsageError
from moe_lightning.placement.memory import Capacity

_GB = 1e9


class Filling:
    """Which slots can take another expert.

    A slot's free bytes are spent evenly over the layers: after half of the bytes to place, a slot
    should not be more than half full. So a small slot gets fewer experts of *every* layer, and not
    all of the first layers and none of the last: layers run one after the other, so each of them
    should use all slots. Where no slot has room left by this rule (sizes are whole experts), any
    slot with room will do.

    Args:
        num_copies: Number of copies of experts to place in each MoE layer.
        num_slots: Number of slots.
        capacity: The room of each slot; None means no limit.

    Attributes:
        num_in_layer: Copies that each slot got in the current layer.
        used_bytes: Bytes that each slot got in the layers before (without a capacity, copies).
    """

    def __init__(
        self, num_copies: Mapping[int, int], num_slots: int, capacity: Capacity | None
    ) -> None:
        if num_slots < 1:
            raise UsageError(f"num_slots={num_slots}, but there must be one slot at least.")
        self._copy_bytes = capacity.expert_bytes if capacity else dict.fromkeys(num_copies, 1)
        self._free = capacity.free_bytes if capacity else (float("inf"),) * num_slots
        assert len(self._free) == num_slots, "one number of free bytes for each slot"
        self._names = (capacity and capacity.slot_names) or [f"slot {n}" for n in range(num_slots)]
        self._more_room = capacity.more_room if capacity else Capacity.more_room
        assert all(self._copy_bytes[layer] > 0 for layer in num_copies)
        self._num_copies = num_copies
        self.num_in_layer = [0] * num_slots
        self.used_bytes = [0] * num_slots

    def layers(self) -> Iterator[int]:
        """Yield the layers in the order to place them: large experts first, they are the hardest
        to find room for.
        """
        total = sum(num * self._copy_bytes[layer] for layer, num in self._num_copies.items())
        so_far = 0
        for layer in sorted(self._num_copies, key=lambda n: (-self._copy_bytes[n], n)):
            self._bytes = self._copy_bytes[layer]
            so_far += self._num_copies[layer] * self._bytes
            self._due = [free * so_far / total for free in self._free]
            yield layer
            for slot, num in enumerate(self.num_in_layer):
                self.used_bytes[slot] += num * self._bytes
            self.num_in_layer = [0] * len(self._free)

    def open_slots(self, *, without: Collection[int] = ()) -> list[int]:
        """Return the slots that can take one more copy of an expert of the current layer.

        Args:
            without: Slots that are not asked for.

        Raises:
            UsageError: If there is none; with the numbers, and what to do.
        """
        after = {
            slot: self.used_bytes[slot] + (num + 1) * self._bytes
            for slot, num in enumerate(self.num_in_layer)
            if slot not in without
        }
        fitting = [slot for slot, num_bytes in after.items() if num_bytes <= self._free[slot]]
        if not fitting:
            raise self._no_room(is_replica=bool(without))
        return [slot for slot in fitting if after[slot] <= self._due[slot]] or fitting

    def add(self, slot: int) -> None:
        """Count a copy of an expert of the current layer on a slot."""
        self.num_in_layer[slot] += 1

    def exchange(self, kinds: Sequence[object]) -> list[int]:
        """Let slots of one kind swap what they got in this layer: the largest share goes to the
        slot that is the emptiest so far. If it does not fit so, all stay as they are.

        Args:
            kinds: The kind of each slot.

        Returns:
            For each slot the one that takes its share.
        """
        stay = list(range(len(self._free)))
        new_slot = stay.copy()
        for kind in dict.fromkeys(kinds):
            same = [slot for slot in stay if kinds[slot] == kind]
            by_share = sorted(same, key=lambda s: -self.num_in_layer[s])
            # Among equally empty slots, the one whose share is larger already: no needless swap.
            by_use = sorted(same, key=lambda s: (self.used_bytes[s], -self.num_in_layer[s]))
            for old, new in zip(by_share, by_use, strict=True):
                new_slot[old] = new
        num_in_layer = stay.copy()
        for old, new in enumerate(new_slot):
            num_in_layer[new] = self.num_in_layer[old]
        for slot, num in enumerate(num_in_layer):
            if self.used_bytes[slot] + num * self._bytes > self._due[slot]:
                return stay
        self.num_in_layer = num_in_layer
        return new_slot

    def _no_room(self, *, is_replica: bool) -> UsageError:
        needed = sum(num * self._copy_bytes[layer] for layer, num in self._num_copies.items())
        free = ", ".join(
            f"{name} {n / _GB:.3f} GB" for name, n in zip(self._names, self._free, strict=True)
        )
        why = " (the copies of one expert on different slots)" if is_replica else ""
        return UsageError(
            f"The experts do not fit on the slots{why}: {sum(self._num_copies.values())} of them, "
            f"replicas included, need {needed / _GB:.3f} GB, the next one {self._bytes / _GB:.3f} "
            f"GB; free for experts: {free}. {self._more_room}, ask for "
            "fewer replicas, or make the weights smaller (--model.dtype bfloat16)."
        )
