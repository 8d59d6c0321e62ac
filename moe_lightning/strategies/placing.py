"""From a checkpoint's sizes, the slots and the options to a placement that fits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from transformers import PreTrainedModel

from moe_lightning.errors import UsageError
from moe_lightning.experts.backends import bytes_of_experts
from moe_lightning.modeling.seam import MoELayer, find_moe_layers
from moe_lightning.placement import (
    Capacity,
    ExpertPlacement,
    check_memory,
    load_loads,
    make_placement,
)

PolicyName = Literal["linear", "round_robin", "balanced", "file"]
_FILES = {"loads": "routing_balance.json", "file": "placement.json"}
RESERVE_BYTES = 300 * 2**20  # for activations, caches and what loading needs


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """How experts are given to slots.

    Attributes:
        policy: The rule.
        loads: File of recorded loads, for ``balanced``.
        replicas: Extra copies of busy experts per layer, for ``balanced``.
        file: The placement, for ``file``.
    """

    policy: PolicyName = "linear"
    loads: str | Path | None = None
    replicas: int = 0
    file: str | Path | None = None

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises:
            UsageError: If an option is missing, belongs to another policy, or does not exist.
        """
        if self.policy not in get_args(PolicyName):
            raise UsageError(
                f"trainer.strategy.policy={self.policy!r} does not exist; choose from "
                f"{', '.join(get_args(PolicyName))}."
            )
        needs = {"balanced": "loads", "file": "file"}.get(self.policy)
        given = {"loads": self.loads, "file": self.file, "replicas": self.replicas or None}
        if needs is not None and given[needs] is None:
            raise UsageError(
                f"trainer.strategy.policy={self.policy} needs trainer.strategy.{needs}: "
                f"the {_FILES[needs]} of an earlier run."
            )
        for name, value in given.items():
            fits = self.policy == ("file" if name == "file" else "balanced")
            if value is not None and not fits:
                raise UsageError(
                    f"trainer.strategy.{name} has no meaning with trainer.strategy.policy="
                    f"{self.policy}: leave it out, or set the policy "
                    f"{'file' if name == 'file' else 'balanced'}."
                )
        if self.replicas < 0:
            raise UsageError(f"trainer.strategy.replicas={self.replicas} must not be negative.")

    def place(self, num_experts: Mapping[int, int], num_slots: int) -> ExpertPlacement:
        """Place experts on slots of equal room.

        Args:
            num_experts: Experts of each MoE layer.
            num_slots: Number of slots.

        Returns:
            The placement.

        Raises:
            UsageError: If a file cannot be read, or is for another model or more slots.
        """
        if self.policy == "file":
            assert self.file is not None, "checked when the options were"
            placement = ExpertPlacement.load(self.file)
            placement.check(num_experts, num_slots, name=self.file)
            return placement
        return make_placement(
            self.policy,
            num_experts,
            num_slots,
            loads=None if self.loads is None else load_loads(self.loads),
            num_replicas=self.replicas,
        )


@dataclass(frozen=True, slots=True)
class SlotRoom:
    """A slot as a placement is planned for it.

    Attributes:
        name: What users call it.
        pool: What memory it uses; slots of one pool share its room.
        device_type: ``cpu`` or ``cuda``.
        experts_backend: How it computes experts in inference, which decides how many bytes a weight
            takes.
    """

    name: str
    pool: str
    device_type: str
    experts_backend: str

    def expert_bytes(self, layers: Sequence[MoELayer]) -> dict[int, int]:
        """Bytes of one expert of each layer on this slot.

        Args:
            layers: The model's MoE layers, which may be on meta.
        """
        return {
            layer.layer: bytes_of_experts(self.experts_backend, layer.experts, self.device_type)
            // layer.num_experts
            for layer in layers
        }


def choose_placement(
    model: PreTrainedModel,
    slots: Sequence[SlotRoom],
    options: PlacementOptions,
    *,
    free_bytes: Mapping[str, int],
    home: str,
    more_room: str = "Name more or other slots (--trainer.strategy.slots; cpu may be one)",
) -> ExpertPlacement:
    """Place a model's experts, within the room that there is now.

    Args:
        model: The model on meta, in the dtype that it will have.
        slots: The slots.
        options: How experts are given to slots.
        free_bytes: Free bytes of each pool.
        home: The pool that also holds everything but the experts.
        more_room: What a user can do about too little room, for messages.

    Returns:
        The placement.

    Raises:
        UsageError: If a file is for another model or more slots, or a pool has too little room.
    """
    layers = find_moe_layers(model)
    num_experts = {layer.layer: layer.num_experts for layer in layers}
    by_slot = [slot.expert_bytes(layers) for slot in slots]
    # A weight takes most bytes on some slot; others have room for more experts than that says.
    expert_bytes = {layer: max(each[layer] for each in by_slot) for layer in num_experts}
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    in_experts = sum(
        p.numel() * p.element_size() for layer in layers for p in layer.experts.parameters()
    )
    pools = [slot.pool for slot in slots]
    dense_bytes = total - in_experts
    if options.policy == "file":
        assert options.file is not None, "checked when the options were"
        placement = ExpertPlacement.load(options.file)
        placement.check(num_experts, len(slots), name=options.file)
    else:
        capacity = Capacity.of_devices(
            pools,
            free_bytes=free_bytes,
            expert_bytes=expert_bytes,
            dense_bytes=dense_bytes,
            home=home,
            reserve_bytes=RESERVE_BYTES,
            slot_names=[slot.name for slot in slots],
            more_room=more_room,
        )
        placement = make_placement(
            options.policy,
            num_experts,
            len(slots),
            loads=None if options.loads is None else load_loads(options.loads),
            num_replicas=options.replicas,
            capacity=capacity,
        )
    check_memory(
        placement,
        expert_bytes=expert_bytes,
        dense_bytes=dense_bytes,
        home=home,
        slot_names=[slot.name for slot in slots],
        device_of_slot=pools,
        free_bytes=free_bytes,
        reserve_bytes=RESERVE_BYTES,
        more_room=more_room,
    )
    return placement
