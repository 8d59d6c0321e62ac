"""Recording: the loads of a run over time, and which experts were chosen together, in one file.

A plain NumPy archive, ``routing.npz``: for each MoE layer ``loads_L`` of shape ``[I, E]``, the rows
of each expert in each interval, and, if it was recorded, ``together_L`` of shape ``[E, E]``, the
rows that had both experts.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_lightning.errors import UsageError
from moe_lightning.files import atomic_writer
from moe_lightning.placement.loads import load_loads

_REMEDY = "Give the routing.npz or routing_balance.json of a run."


@dataclass(frozen=True)
class Recording:
    """What routers did during a run.

    Attributes:
        loads: For each MoE layer rows per interval and expert, ``[I, E]`` int64.
        together: For each MoE layer rows that had both of two experts, ``[E, E]`` int64, symmetric,
            with an expert's rows on the diagonal; empty if it was not recorded.
    """

    loads: Mapping[int, NDArray[np.int64]]
    together: Mapping[int, NDArray[np.int64]] = field(default_factory=dict)

    def total(self) -> dict[int, list[int]]:
        """The rows of each expert of each layer, over all intervals."""
        return {layer: loads_IE.sum(axis=0).tolist() for layer, loads_IE in self.loads.items()}


def save_recording(path: str | Path, recording: Recording) -> None:
    """Write a recording.

    Args:
        path: The file; its directory exists.
        recording: What is written.
    """
    arrays = {f"loads_{layer}": loads_IE for layer, loads_IE in recording.loads.items()}
    arrays |= {f"together_{layer}": both_EE for layer, both_EE in recording.together.items()}
    with atomic_writer(Path(path)) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_recording(path: str | Path) -> Recording:
    """Read a recording, or the loads of a ``routing_balance.json`` as one of a single interval.

    Args:
        path: The file.

    Returns:
        The recording, layers in ascending order.

    Raises:
        UsageError: If the file cannot be read, or does not hold loads.
    """
    path = Path(path)
    if path.suffix == ".json":
        loads = load_loads(path)
        return Recording({layer: np.array([row], dtype=np.int64) for layer, row in loads.items()})
    found: dict[str, dict[int, NDArray[np.int64]]] = {"loads": {}, "together": {}}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                match = re.fullmatch(r"(loads|together)_(\d+)", name)
                if match:
                    found[match[1]][int(match[2])] = arrays[name]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}). {_REMEDY}") from None
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise UsageError(f"{path}: is no recording of routing. {_REMEDY}") from None
    if not found["loads"]:
        raise UsageError(f"{path}: holds no loads. {_REMEDY}")
    for layer, loads_IE in found["loads"].items():
        both_EE = found["together"].get(layer)
        num_experts = loads_IE.shape[-1]
        if (
            loads_IE.ndim != 2
            or not np.issubdtype(loads_IE.dtype, np.integer)
            or loads_IE.min(initial=0) < 0
            or (both_EE is not None and both_EE.shape != (num_experts, num_experts))
        ):
            raise UsageError(f"{path}: what it says of layer {layer} are no loads. {_REMEDY}")
    return Recording(dict(sorted(found["loads"].items())), dict(sorted(found["together"].items())))
