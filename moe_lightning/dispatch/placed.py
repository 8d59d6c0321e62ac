"""PlacedDispatcher: the experts of a layer on several devices of one process, all at work at once.

rows ──▶ shares ──▶ slot 1 ┐
              └──▶ slot 2 ┤ in flight
                            │
home's own share meanwhile ─┴─▶ summed in the order of the slots
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.dispatch.bookkeeping import LayerTrace, RoutingLog
from moe_lightning.dispatch.dispatcher import Dispatcher
from moe_lightning.dispatch.interleave import Interleaver, stay
from moe_lightning.dispatch.plan import LayerRoutes, Share
from moe_lightning.dispatch.slots import Compute, Finish, Slot
from moe_lightning.experts import ExpertShard


class PlacedDispatcher(Dispatcher):
    """Sends rows to the slots that hold their experts, and adds up what comes back.

    Args:
        shards: The layer's shard on each slot that holds any of its experts.
        slots: All slots; the first is home.
        num_experts: Logical experts of the layer.
        layer: Decoder layer.
        log: Where the layer's work is recorded while somebody looks.
        interleaver: Who computes while this layer's rows are away; nobody if None.
    """

    sends_rows_away = True

    def __init__(
        self,
        shards: Mapping[int, ExpertShard],
        slots: Sequence[Slot],
        *,
        num_experts: int,
        layer: int,
        log: RoutingLog,
        interleaver: Interleaver | None = None,
    ) -> None:
        super().__init__(layer=layer, num_experts=num_experts, log=log)
        self.shards = dict(shards)
        self.slots = slots
        self._names = tuple(slot.name for slot in slots)
        self._away = stay if interleaver is None else interleaver.away
        experts_of_slot = {slot: shard.expert_ids for slot, shard in shards.items()}
        self._routes = LayerRoutes(num_experts, experts_of_slot, device=slots[0].home)
        # Everything at home and in order: there is nothing to plan.
        is_local = list(shards) == [0] and shards[0].expert_ids == tuple(range(num_experts))
        self._only = shards[0] if is_local else None

    @override
    def __call__(
        self,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        trace = self.log.open(self.layer, self.num_experts, index_TK, weights_TK, slots=self._names)
        if self._only is not None:
            out_TD = self._only.compute(hidden_TD, index_TK, weights_TK)
            trace.lap("compute", 0)
        else:
            slot_TK = self._routes.slots(index_TK)
            trace.goes_to(slot_TK)
            flights = [
                (share, self._start(share, hidden_TD, trace))
                for share in self._routes.shares(index_TK, weights_TK, slot_TK)
            ]
            if meanwhile is not None and flights:
                meanwhile()
                trace.lap("compute", 0)
            out_TD = self._combine(flights, hidden_TD, trace)
        self.log.close(trace)
        return out_TD

    def _start(self, share: Share, hidden_TD: Tensor, trace: LayerTrace) -> Finish:
        slot = self.slots[share.slot]
        compute = self.shards[share.slot].compute
        rows_RD = share.rows(hidden_TD)
        num_bytes = 0
        if share.slot != 0:
            num_bytes = sum(t.nbytes for t in (rows_RD, share.index_RK, share.weights_RK))
            compute = partial(_timed, compute, trace, share.slot, slot.device)
        finish = slot.start(compute, rows_RD, share.index_RK, share.weights_RK)
        trace.lap("dispatch", share.slot, num_bytes=num_bytes)
        return finish

    def _combine(
        self, flights: list[tuple[Share, Finish]], hidden_TD: Tensor, trace: LayerTrace
    ) -> Tensor:
        out_TD: Tensor | None = None
        for share, finish in flights:  # home comes first: it computes while the others do
            num_bytes = 0
            if share.slot == 0:
                part_RD = finish()
                trace.lap("compute", 0)
            else:
                with self._away() as absence:
                    part_RD = finish()
                trace.lap("wait", share.slot, handed_over_s=absence.handed_over_s)
                num_bytes = part_RD.nbytes
            out_TD = share.add(part_RD, out_TD, hidden_TD)
            trace.lap("combine", share.slot, num_bytes=num_bytes)
        return hidden_TD.new_zeros(hidden_TD.shape) if out_TD is None else out_TD


def _timed(
    compute: Compute,
    trace: LayerTrace,
    slot: int,
    device: torch.device,
    rows_RD: Tensor,
    index_RK: Tensor,
    weights_RK: Tensor,
) -> Tensor:
    with trace.beside("compute", slot, device):
        return compute(rows_RD, index_RK, weights_RK)
