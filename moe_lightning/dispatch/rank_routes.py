"""RankRoutes: which rank computes which of a layer's (row, expert) pairs, and what is sent there.

Nothing here is read back from the device: how many rows go where is a tensor until the dispatcher,
which must know, reads it once for the layer.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_lightning.dispatch.exchange import Picked
from moe_lightning.dispatch.plan import LayerRoutes


class RankRoutes(LayerRoutes):
    """Where the experts of one layer are among the ranks of a group.

    Args:
        num_experts: Logical experts of the layer.
        experts_of_slot: For each rank of the group its experts, in the order of its shard; ranks
            may hold none, and several may hold the same expert.
        num_slots: Ranks of the group.
        device: Device of the rows.
    """

    def __init__(
        self,
        num_experts: int,
        experts_of_slot: Mapping[int, Sequence[int]],
        *,
        num_slots: int,
        device: torch.device,
    ) -> None:
        every_slot = {slot: experts_of_slot.get(slot, ()) for slot in range(num_slots)}
        super().__init__(num_experts, every_slot, device=device)
        self._names_PE = torch.stack([self._names_E[slot] for slot in every_slot])
        self._elsewhere_P = torch.tensor([len(e) for e in every_slot.values()], device=device)
        # Counting replicas' loads is free on a CPU and a synchronisation elsewhere.
        self._balances = device.type == "cpu"

    def slots(self, index_TK: Tensor) -> Tensor:
        """The rank that computes each pair.

        Args:
            index_TK: Logical expert of each pair.

        Returns:
            ``[T, K]`` int64.
        """
        return self._balanced_slots(index_TK) if self._balances else self._fixed_slots(index_TK)

    def is_sent(self, slot_TK: Tensor) -> Tensor:
        """Whether a row goes to a rank, ``[P, T]``: once, however many of its experts are there."""
        num_slots = self._elsewhere_P.shape[0]
        is_sent_TP = torch.zeros(
            slot_TK.shape[0], num_slots, dtype=torch.bool, device=slot_TK.device
        )
        return is_sent_TP.scatter_(1, slot_TK, True).T

    def pick(
        self,
        is_sent_PT: Tensor,
        slot_TK: Tensor,
        index_TK: Tensor,
        *,
        num_sent: list[int],
        num_received: list[int],
    ) -> Picked:
        """List the rows that are sent.

        Args:
            is_sent_PT: Whether a row goes to a rank.
            slot_TK: The rank that computes each pair.
            index_TK: Logical expert of each pair.
            num_sent: Rows for each rank.
            num_received: Rows from each rank.

        Returns:
            The rows and their experts, as the ranks that they go to number them.
        """
        sent_S2 = torch.nonzero_static(is_sent_PT, size=sum(num_sent))
        slot_S1, token_S = sent_S2[:, :1], sent_S2[:, 1]
        index_SK = self._names_PE[slot_S1, index_TK[token_S]]
        is_there_SK = slot_TK[token_S] == slot_S1
        index_SK = torch.where(is_there_SK, index_SK, self._elsewhere_P[slot_S1])
        return Picked(token_S, index_SK, num_sent, num_received)
