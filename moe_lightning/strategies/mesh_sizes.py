"""MeshSizes: how the ranks of a run are divided, and which divisions are legal.

world = pp * dp_replicate * fsdp * tp          dense layers:  fsdp * tp   share one copy
      = pp * dp_replicate * efsdp * ep         experts:       efsdp * ep  share one copy
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from moe_lightning.errors import UsageError

Size = int | Literal["auto"]
"""A number of ranks, or ``auto``."""


@dataclass(frozen=True, slots=True)
class MeshSizes:
    """Ranks along each axis of the mesh.

    Attributes:
        pp: Pipeline stages.
        dp_replicate: Copies of all that ``fsdp`` and ``tp`` share (HSDP).
        fsdp: Ranks that share the dense layers' parameters, each with rows of its own.
        tp: Ranks that compute each dense layer together, on the same rows.
        ep: Ranks that share the experts of a layer, each with experts of its own.
    """

    pp: int = 1
    dp_replicate: int = 1
    fsdp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pp * self.dp_replicate * self.fsdp * self.tp

    @property
    def efsdp(self) -> int:
        """Ranks that share each expert's parameters."""
        return self.fsdp * self.tp // self.ep

    @property
    def data(self) -> int:
        """Ranks that get rows of their own."""
        return self.dp_replicate * self.fsdp

    def __str__(self) -> str:
        axes = ("pp", "dp_replicate", "fsdp", "tp", "ep")
        return " x ".join(f"{axis} {getattr(self, axis)}" for axis in axes)


def resolve_sizes(world: int, given: Mapping[str, Size]) -> MeshSizes:
    """Find the sizes that were left open, and check all.

    Of ``pp``, ``tp`` and ``fsdp``, the first that is ``auto`` takes all ranks that the numbers
    leave, and the others that are ``auto`` are 1. ``ep`` is then up to fsdp * tp.

    Args:
        world: Ranks of the run.
        given: For each axis its size; ``auto`` means as above, and 1 for ``dp_replicate``.

    Returns:
        The sizes.

    Raises:
        UsageError: If they cannot be, with the rule and what would be legal.
    """
    for axis, size in given.items():
        if size != "auto" and size < 1:
            raise UsageError(f"{axis}_size is {size}, but it must be 1 or more, or auto.")
    numbers = {a: size for a, size in given.items() if size != "auto" and a != "ep"}
    taken = prod(numbers.values())
    open_axes = [a for a in ("pp", "tp", "fsdp") if given[a] == "auto"]
    if (open_axes and world % taken) or (not open_axes and world != taken):
        what = " * ".join(f"{a}_size {n}" for a, n in numbers.items()) or "1"
        rule = "must divide" if open_axes else "must be"
        raise UsageError(
            f"{what} = {taken} {rule} the number of ranks, {world}. Start "
            f"{taken if not open_axes else f'a multiple of {taken}'} ranks (--trainer.devices and "
            "--trainer.num_nodes, or torchrun's), or leave one size at auto."
        )
    sizes = dict.fromkeys(("pp", "dp_replicate", "fsdp", "tp"), 1) | numbers
    if open_axes:
        sizes[open_axes[0]] = world // taken
    share = sizes["fsdp"] * sizes["tp"]
    ep = share if given["ep"] == "auto" else int(given["ep"])
    _check_ep(ep, sizes)
    if sizes["pp"] > 1 and (sizes["dp_replicate"] * sizes["fsdp"] > 1 or ep > 1):
        raise UsageError(
            f"pp_size {sizes['pp']} goes with tp_size only: pipeline stages are not sharded "
            "further here. Set fsdp_size, dp_replicate_size and ep_size to 1."
        )
    return MeshSizes(**sizes, ep=ep)


def _check_ep(ep: int, sizes: Mapping[str, int]) -> None:
    share, tp = sizes["fsdp"] * sizes["tp"], sizes["tp"]
    if share % ep or (ep > 1 and ep % tp):
        legal = [n for n in range(1, share + 1) if share % n == 0 and (n % tp == 0 or n == 1)]
        raise UsageError(
            f"ep_size is {ep}, but it must divide fsdp_size * tp_size = {sizes['fsdp']} * {tp} = "
            f"{share}"
            + (f" and be a multiple of tp_size {tp}" if tp > 1 else "")
            + f". Use one of {', '.join(map(str, legal))}, or auto for {share}."
        )
