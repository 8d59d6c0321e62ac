"""PlacedDispatcher: the experts of a layer on several devices of one process, all at work at once.

rows ──▶ shares ──▶ slot 1 ┐
              └──▶ slot 2 ┤ in flight
                            │
home's own share meanwhile ─┴─▶ summed in the order of the slots
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

from torch import Tensor
from typing_extensions import override

from moe_lightning.dispatch.bookkeeping import LayerTrace, RoutingLog, maybe_span
from moe_lightning.dispatch.dispatcher import Dispatcher
from moe_lightning.dispatch.interleave import Interleaver
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
        self._away = nullcontext if interleaver is None else interleaver.away
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
        trace = None
        if self.log.is_read:
            trace = LayerTrace(self.layer, self.num_experts, index_TK, weights_TK)
        if self._only is not None:
            out_TD = self._compute(0, trace)(hidden_TD, index_TK, weights_TK)
        else:
            flights = [
                (share, self._start(share, hidden_TD, trace))
                for share in self._routes.shares(index_TK, weights_TK)
            ]
            if meanwhile is not None and flights:
                meanwhile()
            out_TD = self._combine(flights, hidden_TD, trace)
        if trace is not None:
            self.log.publish(trace)
        return out_TD

    def _start(self, share: Share, hidden_TD: Tensor, trace: LayerTrace | None) -> Finish:
        slot = self.slots[share.slot]
        with maybe_span(trace, "dispatch", slot.name) as span:
            rows_RD = share.rows(hidden_TD)
            if span is not None and share.slot != 0:
                span.num_bytes = sum(t.nbytes for t in (rows_RD, share.index_RK, share.weights_RK))
            compute = self._compute(share.slot, trace)
            return slot.start(compute, rows_RD, share.index_RK, share.weights_RK)

    def _compute(self, slot: int, trace: LayerTrace | None) -> Compute:
        compute = self.shards[slot].compute
        return compute if trace is None else partial(_traced, compute, trace, self.slots[slot].name)

    def _combine(
        self, flights: list[tuple[Share, Finish]], hidden_TD: Tensor, trace: LayerTrace | None
    ) -> Tensor:
        out_TD: Tensor | None = None
        for share, finish in flights:  # home comes first: it computes while the others do
            name = self.slots[share.slot].name
            if share.slot == 0:
                part_RD = finish()
            else:
                with maybe_span(trace, "wait", name), self._away():
                    part_RD = finish()
            with maybe_span(trace, "combine", name) as span:
                if span is not None and share.slot != 0:
                    span.num_bytes = part_RD.nbytes
                out_TD = share.add(part_RD, out_TD, hidden_TD)
        return hidden_TD.new_zeros(hidden_TD.shape) if out_TD is None else out_TD


def _traced(
    compute: Compute,
    trace: LayerTrace,
    slot: str,
    rows_RD: Tensor,
    index_RK: Tensor,
    weights_RK: Tensor,
) -> Tensor:
    with trace.span("compute", slot):
        return compute(rows_RD, index_RK, weights_RK)
