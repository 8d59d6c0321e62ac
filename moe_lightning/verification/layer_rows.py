"""LayerRows: all that was captured of one layer's experts, and what recomputes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The reference's experts of the layer: (rows, experts, weights) to weighted sums."""


class Unit(NamedTuple):
    """An expert, and the slot that computed it, -1 if that is not known."""

    expert: int
    slot: int


@dataclass(frozen=True, slots=True)
class LayerRows:
    """All captured rows of one layer's experts.

    Attributes:
        hidden_TD: What experts got.
        index_TK: Their experts.
        weights_TK: Their weights.
        out_TD: The sums.
        slot_TK: Slots by number, -1 where not known.
        place_T: For each position, the number of its row and where it is in it.
    """

    hidden_TD: Tensor
    index_TK: Tensor
    weights_TK: Tensor
    out_TD: Tensor
    slot_TK: Tensor
    place_T: Sequence[tuple[int, int]]
