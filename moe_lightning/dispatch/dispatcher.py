"""The interface of all dispatchers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from moe_lightning.dispatch.bookkeeping import RoutingLog


class Dispatcher(ABC):
    """Takes the rows of one MoE layer to their experts and brings back one weighted sum per row.

    Attributes:
        sends_rows_away: Whether the device of the rows may have time for other work meanwhile.

    Args:
        layer: Decoder layer.
        num_experts: Logical experts of the layer.
        log: Where the layer's work is recorded while somebody looks.
    """

    sends_rows_away: ClassVar[bool] = False

    def __init__(self, *, layer: int, num_experts: int, log: RoutingLog) -> None:
        self.layer = layer
        self.num_experts = num_experts
        self.log = log

    @abstractmethod
    def __call__(
        self,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        """Compute the layer's experts.

        Args:
            hidden_TD: Rows. T = 0 is legal.
            index_TK: Logical expert of each row, int64, in [0, num_experts).
            weights_TK: Router weights.
            meanwhile: Work that may be done on the device of the rows while they are away; called
                once, or not at all.

        Returns:
            ``[T, D]`` in the dtype of ``hidden_TD``.
        """
