"""ExpertShard: some experts of one layer on one device, and how they are computed."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_lightning.experts.backends import Backend


class ExpertShard:
    """Some experts of one layer on one device.

    The experts are the family's own module whose parameters have only these experts' rows. Row
    ``i`` of each parameter is logical expert ``expert_ids[i]``.

    Args:
        experts: The family's experts module, holding exactly the given experts.
        layer: Decoder layer that the experts belong to.
        expert_ids: Logical experts held here, in the order of the parameters' rows.
        backend: How they are computed.
    """

    def __init__(
        self, experts: nn.Module, *, layer: int, expert_ids: Sequence[int], backend: Backend
    ) -> None:
        assert experts.num_experts == len(expert_ids), (
            "a shard's module must hold its experts and no others"
        )
        self.experts = experts
        self.layer = layer
        self.expert_ids = tuple(expert_ids)
        self.backend = backend

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.experts.parameters()).device

    @property
    def num_bytes(self) -> int:
        """Bytes that the weights take."""
        return sum(p.numel() * p.element_size() for p in self.experts.parameters())

    def compute(self, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """The weighted sum of the shard's experts for each row; a pure function of its arguments.

        Args:
            rows_RD: Received rows, on the shard's device.
            index_RK: *Local* expert of each row: positions in ``expert_ids``.
            weights_RK: Router weights.

        Returns:
            ``[R, D]``, in the dtype of ``rows_RD``.
        """
        return self.backend(self.experts, rows_RD, index_RK, weights_RK)
