"""HeldExperts: the experts of one layer that a process holds, in one shard or several."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lightning.experts.shard import ExpertShard


class HeldExperts:
    """Shards of one layer, computed together, experts named as the checkpoint does.

    Args:
        num_experts: Logical experts of the layer.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._parts: tuple[tuple[ExpertShard, Tensor], ...] = ()
        self._is_held_E = torch.zeros(num_experts + 1, dtype=torch.bool)
        self._is_held_E[num_experts] = True  # "elsewhere" is never missed

    @property
    def expert_ids(self) -> tuple[int, ...]:
        """Logical experts held, ascending."""
        return tuple(self._is_held_E[:-1].nonzero().squeeze(1).tolist())

    @property
    def shards(self) -> tuple[ExpertShard, ...]:
        """The shards, in the order they came."""
        return tuple(shard for shard, _ in self._parts)

    def add(self, shard: ExpertShard) -> None:
        """Hold another shard; its experts are not held yet. Threads that compute may go on."""
        ids = list(shard.expert_ids)
        local_E = torch.full((self.num_experts + 1,), len(ids))
        local_E[ids] = torch.arange(len(ids))
        self._parts = (*self._parts, (shard, local_E.to(shard.device)))
        self._is_held_E[ids] = True

    def missing(self, experts: Sequence[int]) -> list[int]:
        """Those of some experts that are not held."""
        return [expert for expert in experts if not self._is_held_E[expert]]

    def holds(self, index_RK: Tensor) -> bool:
        """Whether all of these experts are held; read on the host.

        Args:
            index_RK: Logical experts on the host, or any other numbers, which are not held.
        """
        if index_RK.numel() == 0:
            return True
        lowest, highest = index_RK.aminmax()
        is_known = int(lowest) >= 0 and int(highest) <= self.num_experts
        return is_known and bool(self._is_held_E[index_RK].all())

    def compute(self, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """The weighted sum of the held experts for each row.

        Args:
            rows_RD: Rows on the shards' device.
            index_RK: Logical experts, int64; ``num_experts`` stands for one that is elsewhere.
            weights_RK: Router weights.

        Returns:
            ``[R, D]`` in the dtype of ``rows_RD``.
        """
        out_RD: Tensor | None = None
        for shard, local_E in self._parts:
            part_RD = shard.compute(rows_RD, local_E[index_RK], weights_RK)
            out_RD = part_RD if out_RD is None else out_RD.add_(part_RD)
        return torch.zeros_like(rows_RD) if out_RD is None else out_RD
