"""The naive way of expert parallelism over RPC, as guides describe it: a call for each expert.

    for each expert that has rows:  its rows ──▶ its worker ──▶ the expert's output for each row
    wait for all; weight and sum up on the master

A row travels once for each of its experts, there and back. It asks the same workers over the same
transport as RemoteDispatcher does, so only the way of asking differs.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.dispatch import Dispatcher, RoutingLog
from moe_lightning.dispatch.remote import RemoteExperts


class NaiveDispatcher(Dispatcher):
    """A message for each expert; all of a layer are in flight, and the master waits.

    Args:
        remote: The workers.
        slot_of: The worker of each expert.
        layer: Decoder layer.
        log: Where the layer's work is recorded while somebody looks.
    """

    def __init__(
        self, remote: RemoteExperts, *, slot_of: Sequence[int], layer: int, log: RoutingLog
    ) -> None:
        super().__init__(layer=layer, num_experts=len(slot_of), log=log)
        self._remote = remote
        self._slot_of = slot_of

    @override
    def __call__(
        self,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        names, home = self._remote.names, self._remote.home
        trace = self.log.open(
            self.layer, self.num_experts, index_TK, weights_TK, slots=names, home=home
        )
        flights = []
        for expert, slot in enumerate(self._slot_of):
            token_R, choice_R = (index_TK == expert).nonzero(as_tuple=True)
            if token_R.numel() == 0:
                continue
            index_R1 = torch.full((token_R.numel(), 1), expert)
            weights_R1 = weights_TK.new_ones(token_R.numel(), 1)
            flight = self._remote.ask(slot, self.layer, hidden_TD[token_R], index_R1, weights_R1)
            trace.lap("dispatch", slot, num_bytes=flight.num_bytes_sent)
            flights.append((slot, token_R, weights_TK[token_R, choice_R], flight))
        out_TD = torch.zeros_like(hidden_TD)
        for slot, token_R, weights_R, flight in flights:
            rows_RD = flight.result()
            trace.lap("wait", slot)
            trace.was_beside(
                "compute", slot, end_s=time.perf_counter(), duration_s=flight.compute_s
            )
            out_TD.index_add_(0, token_R, rows_RD * weights_R[:, None])
            trace.lap("combine", slot, num_bytes=flight.num_bytes_received)
        self.log.close(trace)
        return out_TD
