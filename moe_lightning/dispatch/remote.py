"""RemoteDispatcher: the experts of a layer on workers that are reached by messages.

rows ──▶ shares ──▶ worker 0 ┐
              └──▶ worker 1 ┤ all messages leave before any answer is waited for
                              │
shared experts, experts at home meanwhile ─┴─▶ summed in the order of the workers

The rows of a worker that is lost go, as they were, to those who hold or adopt its experts.
"""

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.dispatch.bookkeeping import LayerTrace, RoutingLog
from moe_lightning.dispatch.dispatcher import Dispatcher
from moe_lightning.dispatch.interleave import Interleaver, stay
from moe_lightning.dispatch.plan import LayerRoutes, Share
from moe_lightning.experts import HeldExperts
from moe_lightning.transport.transport import WorkerLost


class Flight(Protocol):
    """Rows on their way to a worker, and their sums on the way back."""

    @property
    def num_bytes_sent(self) -> int:
        """Bytes of the message."""

    @property
    def num_bytes_received(self) -> int:
        """Bytes of the answer, once it is there."""

    @property
    def compute_s(self) -> float:
        """How long the worker computed, once the answer is there."""

    def result(self) -> Tensor:
        """Wait for the sums, ``[R, D]`` on the device of the rows.

        Raises:
            WorkerLost: If the worker is gone.
        """


class RemoteExperts(Protocol):
    """Who holds which experts now, and how they are asked.

    Attributes:
        names: Name of each slot.
        home: The slot that is this process itself.
    """

    names: tuple[str, ...]
    home: int

    def routes(self, layer: int) -> LayerRoutes:
        """Where the layer's experts are now, by logical numbers."""

    def held_at_home(self, layer: int) -> HeldExperts:
        """The layer's experts that this process holds."""

    def ask(
        self, slot: int, layer: int, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor
    ) -> Flight:
        """Send rows to a worker.

        Raises:
            WorkerLost: If it is known to be gone.
        """

    def recover(self, slot: int) -> None:
        """See to it that others hold a lost worker's experts.

        Raises:
            WorkersLostError: If nobody can.
        """


class RemoteDispatcher(Dispatcher):
    """Sends rows to the workers that hold their experts, and adds up what comes back.

    Args:
        remote: The workers.
        num_experts: Logical experts of the layer.
        layer: Decoder layer.
        log: Where the layer's work is recorded while somebody looks.
        interleaver: Who computes while this layer's rows are away; nobody if None.
    """

    sends_rows_away = True

    def __init__(
        self,
        remote: RemoteExperts,
        *,
        num_experts: int,
        layer: int,
        log: RoutingLog,
        interleaver: Interleaver | None = None,
    ) -> None:
        super().__init__(layer=layer, num_experts=num_experts, log=log)
        self.remote = remote
        self._away = stay if interleaver is None else interleaver.away

    @override
    def __call__(
        self,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        trace = self.log.open(
            self.layer,
            self.num_experts,
            index_TK,
            weights_TK,
            slots=self.remote.names,
            home=self.remote.home,
        )
        out_TD = self._compute(hidden_TD, index_TK, weights_TK, meanwhile, trace)
        self.log.close(trace)
        return out_TD

    def _compute(
        self,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        meanwhile: Callable[[], None] | None,
        trace: LayerTrace,
    ) -> Tensor:
        home = self.remote.home
        routes = self.remote.routes(self.layer)
        slot_TK = routes.slots(index_TK)
        if trace.slot_TK is None:  # rows that are sent again have been counted
            trace.goes_to(slot_TK)
        shares = routes.shares(index_TK, weights_TK, slot_TK)
        flights = [
            # The clock first: the worker may answer before this thread comes to look at it.
            (share, time.perf_counter(), self._send(share, hidden_TD, trace))
            for share in shares
            if share.slot != home
        ]
        if meanwhile is not None and flights:
            meanwhile()
            trace.lap("compute", home)
        out_TD: Tensor | None = None
        for share in shares:
            if share.slot == home:
                held = self.remote.held_at_home(self.layer)
                part_RD = held.compute(share.rows(hidden_TD), share.index_RK, share.weights_RK)
                out_TD = share.add(part_RD, out_TD, hidden_TD)
                trace.lap("compute", home)
        for share, left_s, flight in flights:
            part_RD = self._receive(share, flight, left_s, hidden_TD, trace)
            out_TD = share.add(part_RD, out_TD, hidden_TD)
            num_bytes = 0 if isinstance(flight, WorkerLost) else flight.num_bytes_received
            trace.lap("combine", share.slot, num_bytes=num_bytes)
        return torch.zeros_like(hidden_TD) if out_TD is None else out_TD

    def _send(self, share: Share, hidden_TD: Tensor, trace: LayerTrace) -> Flight | WorkerLost:
        rows_RD = share.rows(hidden_TD)
        try:
            flight = self.remote.ask(
                share.slot, self.layer, rows_RD, share.index_RK, share.weights_RK
            )
        except WorkerLost as lost:
            trace.lap("dispatch", share.slot)
            return lost  # the other workers' rows leave first
        trace.lap("dispatch", share.slot, num_bytes=flight.num_bytes_sent)
        return flight

    def _receive(
        self,
        share: Share,
        flight: Flight | WorkerLost,
        left_s: float,
        hidden_TD: Tensor,
        trace: LayerTrace,
    ) -> Tensor:
        try:
            if isinstance(flight, WorkerLost):
                raise flight
            with self._away() as absence:
                part_RD = flight.result()
                now_s = time.perf_counter()
            trace.lap("wait", share.slot, handed_over_s=absence.handed_over_s)
        except WorkerLost as lost:
            self.remote.recover(lost.worker)
            trace.lap("wait", share.slot)
            rows_RD = share.rows(hidden_TD)
            return self._compute(rows_RD, share.index_RK, share.weights_RK, None, trace)
        trace.was_beside("compute", share.slot, end_s=now_s, duration_s=flight.compute_s)
        trace.was_under_way(share.slot, now_s - left_s - flight.compute_s)
        return part_RD
