"""Holdings: which worker holds which experts now, and where rows go by that."""

from collections.abc import Mapping, Sequence

import torch

from moe_lightning.dispatch.plan import LayerRoutes
from moe_lightning.placement import ExpertPlacement
from moe_lightning.placement.adoption import Survivor


class Holdings:
    """Who holds what; begins as a placement says, and changes as workers are lost.

    Args:
        placement: The placement.
        device: Where the rows that are to be routed are.
    """

    def __init__(self, placement: ExpertPlacement, *, device: torch.device) -> None:
        self._holders = {
            layer: [set(slots) for slots in experts] for layer, experts in placement.slots.items()
        }
        self._device = device
        self._routes: dict[int, LayerRoutes] = {}

    def routes(self, layer: int) -> LayerRoutes:
        """Where the layer's experts are, as of the last :meth:`plan_routes`."""
        return self._routes[layer]

    def plan_routes(self) -> None:
        """Route rows by who holds what now; every expert has a holder."""
        for layer, experts in self._holders.items():
            held: dict[int, list[int]] = {}
            for expert, holders in enumerate(experts):
                for slot in holders:
                    held.setdefault(slot, []).append(expert)
            self._routes[layer] = LayerRoutes(
                len(experts), held, device=self._device, numbering="logical"
            )

    def hold(self, slot: int, experts: Mapping[int, Sequence[int]]) -> None:
        """Note that a slot holds more experts."""
        for layer, ids in experts.items():
            for expert in ids:
                self._holders[layer][expert].add(slot)

    def drop(self, slot: int) -> None:
        """Note that a slot holds nothing any more."""
        for experts in self._holders.values():
            for holders in experts:
                holders.discard(slot)

    def orphans(self) -> dict[int, list[int]]:
        """Experts that nobody holds, by layer; layers without any are left out."""
        orphans = {
            layer: [expert for expert, holders in enumerate(experts) if not holders]
            for layer, experts in self._holders.items()
        }
        return {layer: experts for layer, experts in orphans.items() if experts}

    def survivor(self, slot: int, pool: str, expert_bytes: Mapping[int, int]) -> Survivor:
        """A slot as one that may adopt.

        Args:
            slot: The slot.
            pool: What memory it uses.
            expert_bytes: Bytes of one expert of each layer on it.
        """
        num_held = {
            layer: sum(slot in holders for holders in experts)
            for layer, experts in self._holders.items()
        }
        return Survivor(pool, num_held, expert_bytes)


def in_words(experts: Mapping[int, Sequence[int]]) -> str:
    """Layers and experts in few words."""
    some = [
        f"layer {layer}: {', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}"
        for layer, ids in list(experts.items())[:3]
    ]
    more = f"; and {len(experts) - 3} more layers" if len(experts) > 3 else ""
    total = sum(len(ids) for ids in experts.values())
    return f"{total} expert{'s' if total != 1 else ''} ({'; '.join(some)}{more})"
