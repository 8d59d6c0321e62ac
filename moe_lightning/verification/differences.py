"""How far two results are apart: a number a position, the largest with its place, a layer's."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-2
"""A vector is taken to be at least this share of the typical one: of a very small one only the
rounding errors of what was added up are left."""


def relative_differences(got_TX: Tensor, wanted_TX: Tensor) -> Tensor:
    """The relative difference of every position.

    Args:
        got_TX: What was computed.
        wanted_TX: What should have been.

    Returns:
        ``|got - wanted| / |wanted|`` in the Euclidean norm, ``[T]`` in fp32; infinite where
        something is not finite.
    """
    got_TX, wanted_TX = got_TX.float(), wanted_TX.float()
    off_T = (got_TX - wanted_TX).norm(dim=-1)
    size_T = wanted_TX.norm(dim=-1)
    size_T = size_T.clamp(min=FLOOR * float(size_T.square().mean().sqrt()) if len(size_T) else 0.0)
    rel_T = torch.where(off_T == 0, 0.0, off_T / size_T)
    return rel_T.nan_to_num(nan=math.inf, posinf=math.inf)


@dataclass(slots=True)
class Largest:
    """The largest difference seen so far.

    Attributes:
        absolute: Of any number.
        relative: Of any position, see :func:`relative_differences`.
        row: Number of the row with the largest relative difference.
        position: Its position.
        num_over: Positions above the tolerance.
        num_positions: Positions seen.
    """

    absolute: float = 0.0
    relative: float = 0.0
    row: int | None = None
    position: int | None = None
    num_over: int = 0
    num_positions: int = 0

    def see(
        self,
        got_TX: Tensor,
        wanted_TX: Tensor,
        *,
        row: int,
        tolerance: float,
        positions_T: Tensor | None = None,
    ) -> None:
        """Look at some positions of a row.

        Args:
            got_TX: What was computed.
            wanted_TX: What should have been.
            row: Number of the row.
            tolerance: The largest relative difference that is right.
            positions_T: The positions; None counts from 0.
        """
        if got_TX.shape[0] == 0:
            return
        wanted_TX = wanted_TX.to(got_TX.device)
        rel_T = relative_differences(got_TX, wanted_TX)
        off = float((got_TX.float() - wanted_TX.float()).abs().max())
        self.absolute = max(self.absolute, math.inf if math.isnan(off) else off)
        self.num_over += int((rel_T > tolerance).sum())
        self.num_positions += len(rel_T)
        place = int(rel_T.argmax())
        if self.row is None or float(rel_T[place]) > self.relative:
            self.relative = float(rel_T[place])
            self.row = row
            self.position = place if positions_T is None else int(positions_T[place])

    def to_json(self) -> dict[str, Any]:
        """Plain values; None for what is not finite."""
        return {
            "absolute": _finite(self.absolute),
            "relative": _finite(self.relative),
            "row": self.row,
            "position": self.position,
            "num_positions_over": self.num_over,
            "num_positions": self.num_positions,
        }


@dataclass(slots=True)
class LayerDifference:
    """Differences of one decoder layer.

    Attributes:
        hidden: Its output, end to end.
        dense: All of it but the router and the routed experts, alone.
        router: Router weights by expert, alone; None for a layer without experts.
        experts: The routed experts' sums, alone; None for a layer without experts.
        num_ties: Positions where the router chose otherwise between experts that are as good.
        num_other_choices: Positions where it chose otherwise and should not have.
        weight_sums: Sums of router weights over all positions, the configured ones and the
            reference's.
    """

    hidden: Largest = field(default_factory=Largest)
    dense: Largest = field(default_factory=Largest)
    router: Largest | None = None
    experts: Largest | None = None
    num_ties: int = 0
    num_other_choices: int = 0
    weight_sums: list[float] = field(default_factory=lambda: [0.0, 0.0])


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
