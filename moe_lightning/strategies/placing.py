"""From a checkpoint's sizes, the devices and the options to a placement that fits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
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
from moe_lightning.strategies.devices import free_bytes

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


def choose_placement(
    model: PreTrainedModel,
    devices: Sequence[torch.device],
    options: PlacementOptions,
    *,
    experts_backend: str,
) -> ExpertPlacement:
    """Place a model's experts, within the room that the devices have now.

    Args:
        model: The model on meta, in the dtype that it will have.
        devices: Device of each slot; the first one also holds everything but the experts.
        options: How experts are given to slots.
        experts_backend: Backend in inference, which decides how many bytes a weight takes.

    Returns:
        The placement.

    Raises:
        UsageError: If a file is for another model or more slots, or a device has too little room.
    """
    layers = find_moe_layers(model)
    num_experts = {layer.layer: layer.num_experts for layer in layers}
    expert_bytes = {layer.layer: _expert_bytes(layer, devices, experts_backend) for layer in layers}
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    in_experts = sum(
        p.numel() * p.element_size() for layer in layers for p in layer.experts.parameters()
    )
    names = [str(device) for device in devices]
    free = {str(device): free_bytes(device) for device in devices}
    dense_bytes = total - in_experts
    if options.policy == "file":
        assert options.file is not None, "checked when the options were"
        placement = ExpertPlacement.load(options.file)
        placement.check(num_experts, len(devices), name=options.file)
    else:
        capacity = Capacity.of_devices(
            names,
            free_bytes=free,
            expert_bytes=expert_bytes,
            dense_bytes=dense_bytes,
            reserve_bytes=RESERVE_BYTES,
        )
        placement = make_placement(
            options.policy,
            num_experts,
            len(devices),
            loads=None if options.loads is None else load_loads(options.loads),
            num_replicas=options.replicas,
            capacity=capacity,
        )
    check_memory(
        placement,
        expert_bytes=expert_bytes,
        dense_bytes=dense_bytes,
        slot_names=[f"{number}:{name}" for number, name in enumerate(names)],
        device_of_slot=names,
        free_bytes=free,
        reserve_bytes=RESERVE_BYTES,
    )
    return placement


def _expert_bytes(layer: MoELayer, devices: Sequence[torch.device], experts_backend: str) -> int:
    """Bytes of one expert, on the kind of device where it takes most."""
    kinds = {device.type for device in devices}
    most = max(bytes_of_experts(experts_backend, layer.experts, kind) for kind in kinds)
    return most // layer.num_experts
