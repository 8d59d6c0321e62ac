"""ExpertPlacement: which slots hold each expert. A plain value; how one is chosen is in `policies`.

Slots are numbers. What they are (devices of one process, workers, ranks) is the strategy's affair,
so one file is valid under every strategy.

                   expert   0      1      2              slot 0: experts 0, 2
    layer 1: slots         (0,)   (1,)   (0, 2)    ◀──▶  slot 1: expert 1
                                                         slot 2: expert 2, a replica
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lightning.errors import UsageError
from moe_lightning.files import write_atomically
from moe_lightning.placement.json_file import layers_of, parse_object, read_text

_FORMAT = "moe_lightning expert placement"
_VERSION = 1
_KIND = "a placement"
_REMEDY = "Correct it, or let a policy make the placement (linear, round_robin, balanced)."


@dataclass(frozen=True)
class ExpertPlacement:
    """The slots that hold each expert of each MoE layer.

    Layers and the slots of an expert are kept in ascending order, so placements that say the same
    are equal. Slots may hold any number of experts, none included.

    Args:
        num_slots: Number of slots; they are called 0 to `num_slots - 1`.
        slots: For each MoE layer (its index among the decoder layers; dense layers leave gaps) and
            each of its experts the slots that hold it: one, or several (replicas).

    Raises:
        UsageError: If an expert has no slot, one slot twice, or a slot that does not exist.
    """

    num_slots: int
    slots: Mapping[int, tuple[tuple[int, ...], ...]]

    def __post_init__(self) -> None:
        if self.num_slots < 1:
            raise UsageError(f"num_slots={self.num_slots}, but there must be one slot at least.")
        for layer, experts in self.slots.items():
            for expert, slots in enumerate(experts):
                problem = _problem(slots, self.num_slots)
                if problem:
                    raise UsageError(f"layer {layer}, expert {expert}: {problem}. {_REMEDY}")
        in_order = {
            layer: tuple(tuple(sorted(map(int, slots))) for slots in self.slots[layer])
            for layer in sorted(self.slots)
        }
        object.__setattr__(self, "slots", in_order)

    @property
    def layers(self) -> tuple[int, ...]:
        """The MoE layers, ascending."""
        return tuple(self.slots)

    def num_experts(self, layer: int) -> int:
        """Return the number of logical experts of a layer."""
        return len(self.slots[layer])

    def experts_of(self, slot: int, layer: int) -> tuple[int, ...]:
        """Return the experts of a layer that a slot holds, ascending."""
        return tuple(e for e, slots in enumerate(self.slots[layer]) if slot in slots)

    def experts_by_layer(self, slot: int) -> dict[int, tuple[int, ...]]:
        """Return the experts that a slot holds, ascending, for every layer; possibly none."""
        return {layer: self.experts_of(slot, layer) for layer in self.slots}

    @property
    def num_replicas(self) -> int:
        """Copies beyond the first of each expert, over all layers."""
        return sum(len(slots) - 1 for experts in self.slots.values() for slots in experts)

    def check(
        self,
        num_experts_by_layer: Mapping[int, int],
        num_slots: int,
        *,
        name: str | Path = "the placement",
    ) -> None:
        """Check that the placement is for a model and for the slots there are.

        Args:
            num_experts_by_layer: Number of experts of each MoE layer of the model.
            num_slots: Number of slots there are. Slots that the placement does not know stay empty.
            name: The file that the placement comes from, for messages.

        Raises:
            UsageError: If it is for another model or for more slots.
        """
        other_model = (
            "It was made for another model: use one made for this model, or a policy (linear, "
            "round_robin, balanced)."
        )
        if set(num_experts_by_layer) != set(self.slots):
            raise UsageError(
                f"{name}: has the MoE layers {_ranges(self.slots)}, but the model has "
                f"{_ranges(num_experts_by_layer)}. {other_model}"
            )
        for layer, num_experts in num_experts_by_layer.items():
            if self.num_experts(layer) != num_experts:
                raise UsageError(
                    f"{name}: layer {layer} has {self.num_experts(layer)} experts, but the model "
                    f"has {num_experts}. {other_model}"
                )
        if self.num_slots > num_slots:
            raise UsageError(
                f"{name}: is for {self.num_slots} slots, but there are {num_slots}. Give "
                f"{self.num_slots} slots (a device may be named twice), or use a placement for at "
                f"most {num_slots}."
            )

    def to_json(self) -> str:
        """Return the placement as JSON text, one line a layer."""
        layers = ",\n".join(
            f'    "{layer}": {json.dumps(experts, separators=(",", ":"))}'
            for layer, experts in self.slots.items()
        )
        return (
            f'{{\n  "format": "{_FORMAT}",\n  "version": {_VERSION},\n'
            f'  "num_slots": {self.num_slots},\n  "layers": {{\n{layers}\n  }}\n}}\n'
        )

    @classmethod
    def from_json(cls, text: str, *, name: str | Path = "the placement") -> "ExpertPlacement":
        """Read what `to_json` writes; an expert on one slot may be given as a bare number.

        Args:
            text: The JSON text.
            name: The file, for messages.

        Raises:
            UsageError: If the text is no placement; the message names file, layer and expert.
        """
        content = parse_object(text, name=str(name), kind=_KIND)
        if content.get("format") != _FORMAT:
            raise UsageError(
                f'{name}: "format" is {content.get("format")!r:.60} and not "{_FORMAT}", so this '
                "is not a placement. Check the path."
            )
        if not _is_int(content.get("version")) or content["version"] != _VERSION:
            raise UsageError(
                f'{name}: "version" is {content.get("version")!r:.40}, but this release reads '
                f"version {_VERSION}. Use the release that wrote the file, or make it again."
            )
        if not _is_int(content.get("num_slots")):
            raise UsageError(
                f'{name}: "num_slots" is {content.get("num_slots")!r:.40}, but it must be the '
                "number of slots, a whole number. Correct the file."
            )
        layers = layers_of(content, "layers", name=str(name))
        slots = {
            layer: tuple(
                _as_slots(value, where=f"{name}: layer {layer}, expert {expert}")
                for expert, value in enumerate(experts)
            )
            for layer, experts in layers.items()
        }
        try:
            return cls(content["num_slots"], slots)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the placement to a JSON file; a reader sees all of it or none.

        Args:
            path: The file; its directory exists.

        Raises:
            UsageError: If it cannot be written there.
        """
        try:
            write_atomically(Path(path), self.to_json())
        except OSError as error:
            raise UsageError(
                f"{path}: the placement cannot be written ({error.strerror}). Give the path of a "
                "file in a directory that exists and may be written to."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> "ExpertPlacement":
        """Read a placement from a JSON file.

        Raises:
            UsageError: If the file cannot be read or is no placement.
        """
        return cls.from_json(read_text(path, kind=_KIND), name=path)


def _problem(slots: tuple[int, ...], num_slots: int) -> str:
    if not slots:
        return "has no slot, but every expert needs one at least"
    if len(set(slots)) < len(slots):
        return f"is on slots {list(slots)}, one of them twice"
    wrong = [slot for slot in slots if not 0 <= slot < num_slots]
    return f"slot {wrong[0]} is not one of the slots 0 to {num_slots - 1}" if wrong else ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_slots(value: Any, *, where: str) -> tuple[int, ...]:
    slots = value if isinstance(value, list) else [value]
    if not all(_is_int(slot) for slot in slots):
        raise UsageError(
            f"{where}: {value!r:.40} is neither a slot (a whole number) nor a list of slots. "
            f"{_REMEDY}"
        )
    return tuple(slots)


def _ranges(layers: Mapping[int, object]) -> str:
    """Return layer numbers in few words: ``1-3, 5``."""
    starts = [layer for layer in sorted(layers) if layer - 1 not in layers]
    ends = [layer for layer in sorted(layers) if layer + 1 not in layers]
    parts = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return ", ".join(parts) or "(none)"
