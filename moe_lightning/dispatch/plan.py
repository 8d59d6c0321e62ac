"""Which rows go to which slot: one layer's routing, split into one share per slot.

    index_TK ── which slot computes a pair? ──▶ slot_TK ──▶ a slot's tokens, local experts, weights

A row goes to a slot once, however many of its experts are there. A share names experts that are not
on its slot by a number beyond all that are: "elsewhere".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SELECT_TOKENS = 256
"""From so many tokens on, rows on a GPU are picked for each slot. Fewer all go to every slot: with
several experts a token nearly all have to, and picking costs a synchronisation. Not measured."""
NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Share:
    """What one slot computes in one pass of a layer.

    Attributes:
        slot: The slot.
        token_R: The tokens whose rows it takes, ascending; None if it takes all.
        index_RK: Experts of its rows, numbered as the routes were asked to.
        weights_RK: Router weights of its rows.
    """

    slot: int
    token_R: Tensor | None
    index_RK: Tensor
    weights_RK: Tensor

    def rows(self, hidden_TD: Tensor) -> Tensor:
        """The rows that the slot takes, ``[R, D]``; the layer's own tensor if it takes all."""
        return hidden_TD if self.token_R is None else hidden_TD[self.token_R]

    def add(self, part_RD: Tensor, out_TD: Tensor | None, hidden_TD: Tensor) -> Tensor:
        """Add the slot's sums to the layer's output.

        Args:
            part_RD: The sums; those of all rows may become the output.
            out_TD: The sums of other slots; None if these are the first.
            hidden_TD: The layer's rows, whose shape and dtype the output has.

        Returns:
            The output so far.
        """
        if self.token_R is None:
            return part_RD if out_TD is None else out_TD.add_(part_RD)
        if out_TD is None:
            out_TD = hidden_TD.new_zeros(hidden_TD.shape)
        return out_TD.index_add_(0, self.token_R, part_RD)


class LayerRoutes:
    """Where the experts of one layer are.

    Args:
        num_experts: Logical experts of the layer.
        experts_of_slot: For each slot that holds any, its experts in the order of its shard. Every
            expert is on some slot.
        device: Device of the rows.
        select_tokens: From so many tokens on, rows are picked for each slot; fewer go to every
            slot. The default is 0 on a CPU, where picking is cheap, and :data:`SELECT_TOKENS`
            elsewhere.
        numbering: How shares name experts: ``local``, by their place in the slot's shard, or
            ``logical``, as the checkpoint does. "Elsewhere" is the number of experts on the slot,
            or of the layer.
    """

    def __init__(
        self,
        num_experts: int,
        experts_of_slot: Mapping[int, Sequence[int]],
        *,
        device: torch.device,
        select_tokens: int | None = None,
        numbering: Literal["local", "logical"] = "local",
    ) -> None:
        if select_tokens is None:
            select_tokens = 0 if device.type == "cpu" else SELECT_TOKENS
        self._select_tokens = select_tokens
        slots_of: list[list[int]] = [[] for _ in range(num_experts)]
        self._names_E: dict[int, Tensor] = {}
        self._elsewhere: dict[int, int] = {}
        for slot, experts in sorted(experts_of_slot.items()):
            is_local = numbering == "local"
            elsewhere = len(experts) if is_local else num_experts
            # One more than there are experts: a pair that is to be computed nowhere.
            names_E = torch.full((num_experts + 1,), elsewhere)
            names_E[list(experts)] = (
                torch.arange(len(experts)) if is_local else torch.tensor(experts)
            )
            self._names_E[slot] = names_E.to(device)
            self._elsewhere[slot] = elsewhere
            for expert in experts:
                slots_of[expert].append(slot)
        assert all(slots_of), "every expert must be on some slot"
        self._slots_of = slots_of
        self._replicated = [e for e, slots in enumerate(slots_of) if len(slots) > 1]
        # Experts without replicas sort behind all others.
        self._sort_key_E = torch.tensor(
            [e if len(slots) > 1 else num_experts for e, slots in enumerate(slots_of)]
            + [num_experts],
            device=device,
        )
        self._num_replicas_E = torch.tensor([*map(len, slots_of), 1], device=device)
        most = max(len(slots) for slots in slots_of)
        self._slot_EX = torch.tensor(
            [slots + slots[:1] * (most - len(slots)) for slots in slots_of] + [[NOWHERE] * most],
            device=device,
        )

    def slots(self, index_TK: Tensor) -> Tensor:
        """The slot that computes each pair.

        Args:
            index_TK: Logical expert of each pair; the number of experts where a pair is to be
                computed nowhere.

        Returns:
            ``[T, K]`` int64.
        """
        picks_rows = index_TK.shape[0] >= self._select_tokens
        return self._balanced_slots(index_TK) if picks_rows else self._fixed_slots(index_TK)

    def shares(
        self, index_TK: Tensor, weights_TK: Tensor, slot_TK: Tensor | None = None
    ) -> list[Share]:
        """Split one pass of the layer.

        Args:
            index_TK: Logical expert of each pair.
            weights_TK: Router weights.
            slot_TK: What :meth:`slots` gave; None asks it.

        Returns:
            The shares, in the order of the slots; slots without rows are left out where that is
            known.
        """
        picks_rows = index_TK.shape[0] >= self._select_tokens
        if slot_TK is None:
            slot_TK = self.slots(index_TK)
        shares = []
        for slot, names_E in self._names_E.items():
            is_here_TK = slot_TK == slot
            names_TK = names_E[index_TK].where(is_here_TK, self._elsewhere[slot])
            token_R = is_here_TK.any(dim=1).nonzero().squeeze(1) if picks_rows else None
            if token_R is None or token_R.numel() == index_TK.shape[0]:
                shares.append(Share(slot, None, names_TK, weights_TK))
            elif token_R.numel() > 0:
                shares.append(Share(slot, token_R, names_TK[token_R], weights_TK[token_R]))
        return shares

    def _fixed_slots(self, index_TK: Tensor) -> Tensor:
        """Replicas take turns by token: no count is needed, so nothing is read from the device."""
        if not self._replicated:
            return self._slot_EX[index_TK, 0]
        token_T1 = torch.arange(index_TK.shape[0], device=index_TK.device)[:, None]
        return self._slot_EX[index_TK, token_T1 % self._num_replicas_E[index_TK]]

    def _balanced_slots(self, index_TK: Tensor) -> Tensor:
        """Replicas take the rows that even out the slots' loads, experts with most rows first."""
        slot_TK = self._slot_EX[index_TK, 0]
        if not self._replicated:
            return slot_TK
        flat_N = index_TK.reshape(-1)
        slot_N = slot_TK.reshape(-1)
        counts = torch.bincount(flat_N, minlength=len(self._slots_of)).tolist()
        load = dict.fromkeys(self._names_E, 0)
        for expert, slots in enumerate(self._slots_of):
            if len(slots) == 1:
                load[slots[0]] += counts[expert]
        parts: dict[int, list[int]] = {}
        busy = [expert for expert in self._replicated if counts[expert] > 0]
        for expert in sorted(busy, key=lambda e: -counts[e]):
            slots = self._slots_of[expert]
            parts[expert] = even_out([load[slot] for slot in slots], counts[expert])
            for slot, num_rows in zip(slots, parts[expert], strict=True):
                load[slot] += num_rows
        if not busy:
            return slot_TK
        # All replicated experts at once, since an operation each would cost more than it moves:
        # sorted by expert, their pairs come first, and the parts are runs of one slot.
        runs = [run for e in busy for run in zip(self._slots_of[e], parts[e], strict=True)]
        slot_P, rows_P = torch.tensor(runs, device=index_TK.device).unbind(1)
        num_moved = sum(counts[expert] for expert in busy)
        order_N = self._sort_key_E[flat_N].argsort(stable=True)[:num_moved]
        slot_N[order_N] = slot_P.repeat_interleave(rows_P, output_size=num_moved)
        return slot_N.view_as(index_TK)


def even_out(loads: Sequence[int], num_rows: int) -> list[int]:
    """Split rows over bins so that the fullest bin is as empty as it can be.

    Args:
        loads: What the bins hold already.
        num_rows: How many rows to add.

    Returns:
        Rows for each bin. For example ``even_out([5, 1, 2], 4)`` is ``[0, 3, 1]``: the bins then
        hold 5, 4 and 3.
    """
    order = sorted(range(len(loads)), key=lambda b: loads[b])
    level, num_bins = 0, len(order)
    for num_bins in range(1, len(order) + 1):
        filled = sum(loads[b] for b in order[:num_bins]) + num_rows
        level = -(-filled // num_bins)
        if num_bins == len(order) or level <= loads[order[num_bins]]:
            break
    parts, left = [0] * len(loads), num_rows
    for b in order[:num_bins]:
        parts[b] = min(left, max(0, level - loads[b]))
        left -= parts[b]
    return parts
