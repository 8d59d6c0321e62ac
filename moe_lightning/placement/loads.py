"""Loads: how many rows each expert got, and how evenly a placement spreads them over its slots."""

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from moe_lightning.errors import UsageError
from moe_lightning.files import write_atomically
from moe_lightning.placement.json_file import layers_of, parse_object, read_text
from moe_lightning.placement.placement import ExpertPlacement

_KIND = "a file of recorded loads"


def load_loads(path: str | Path) -> dict[int, list[float]]:
    """Read recorded loads: `routing_balance.json` of a run, or a file that says no more than

        {"loads": {"0": [120, 3, 45, 88], "1": [64, 64, 60, 68]}}

    with the rows that each expert of a layer got. Other keys are not looked at.

    Args:
        path: The file.

    Returns:
        The load of each expert of each MoE layer, in ascending order of the layers.

    Raises:
        UsageError: If the file cannot be read, or a load is no number, negative or not finite.
    """
    content = parse_object(read_text(path, kind=_KIND), name=str(path), kind=_KIND)
    return {
        layer: [
            _as_load(value, where=f"{path}: layer {layer}, expert {expert}")
            for expert, value in enumerate(per_expert)
        ]
        for layer, per_expert in layers_of(content, "loads", name=str(path)).items()
    }


def save_loads(path: str | Path, loads: Mapping[int, Sequence[float]]) -> None:
    """Write loads to a file that `load_loads` reads, one line a layer.

    Args:
        path: The file; its directory exists.
        loads: The load of each expert of each MoE layer.
    """
    layers = ",\n".join(f'    "{layer}": {json.dumps(list(loads[layer]))}' for layer in loads)
    write_atomically(Path(path), f'{{\n  "loads": {{\n{layers}\n  }}\n}}\n')


def check_loads(loads: Mapping[int, Sequence[float]], num_experts: Mapping[int, int]) -> None:
    """Check that loads are those of a model.

    Args:
        loads: The load of each expert of each MoE layer.
        num_experts: Number of experts of each MoE layer of the model.

    Raises:
        UsageError: If a layer is missing, unknown or of another length, or a load is negative or
            not finite.
    """
    remedy = "The loads are another model's: record them again with this one."
    differ = sorted(set(loads) ^ set(num_experts))
    if differ:
        who = "the model, but not the loads, has" if differ[0] in num_experts else "the loads have"
        raise UsageError(
            f"loads of {len(loads)} MoE layers for a model of {len(num_experts)}: {who} layer "
            f"{differ[0]}. {remedy}"
        )
    for layer, per_expert in loads.items():
        if len(per_expert) != num_experts[layer]:
            raise UsageError(
                f"loads of {len(per_expert)} experts in layer {layer}, but the model has "
                f"{num_experts[layer]} there. {remedy}"
            )
        for expert, load in enumerate(per_expert):
            _as_load(load, where=f"loads: layer {layer}, expert {expert}")


def imbalance(
    placement: ExpertPlacement,
    loads: Mapping[int, Sequence[float]],
    *,
    speeds: Sequence[float] | None = None,
) -> dict[int, float]:
    """Return the load of the busiest slot over the mean slot's, for each layer.

    1 is perfect and `num_slots` the worst. The replicas of an expert share its load equally.

    Args:
        placement: The placement.
        loads: The load of each expert of each MoE layer.
        speeds: How fast each slot is; loads count in proportion to that. None means equally fast.

    Returns:
        The ratio of each layer; 1 where there is no load.

    Raises:
        UsageError: If the loads are not those of the placement's model.
    """
    check_loads(loads, {layer: placement.num_experts(layer) for layer in placement.layers})
    ratios = {}
    speeds = [1.0] * placement.num_slots if speeds is None else speeds
    for layer, experts in placement.slots.items():
        slot_loads = [0.0] * placement.num_slots
        for slots, load in zip(experts, loads[layer], strict=True):
            for slot in slots:
                slot_loads[slot] += load / len(slots)
        total = sum(slot_loads)
        slowest = max(load / speed for load, speed in zip(slot_loads, speeds, strict=True))
        ratios[layer] = slowest * sum(speeds) / total if total else 1.0
    return ratios


def _as_load(value: Any, *, where: str) -> float:
    try:
        load = float("nan") if isinstance(value, bool | str) else float(value)
    except (TypeError, OverflowError):
        load = float("nan")
    if not isfinite(load) or load < 0:
        raise UsageError(
            f"{where}: the load is {value!r:.40}, but it must be a number of rows, 0 or more. "
            "Correct it, or record the loads again."
        )
    return load
