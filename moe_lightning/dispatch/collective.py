"""CollectiveDispatcher: the experts of a layer over the ranks of a group, rows by all-to-all.

    rank 0: rows ─┐ counts ▶ rows, local experts, weights ┌─▶ rank 0: its experts' weighted sums
    rank 1: rows ─┤                                       ├─▶ rank 1
    rank 2: rows ─┘ ◀──────────── sums ────────────────── └─▶ rank 2

A row travels to a rank once, however many of its experts are there, and one sum comes back. Every
rank makes the same collectives in the same order, whatever its rows: none is legal.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from moe_lightning.dispatch.bookkeeping import LayerTrace, RoutingLog
from moe_lightning.dispatch.dispatcher import Dispatcher
from moe_lightning.dispatch.exchange import RowExchange
from moe_lightning.dispatch.rank_routes import RankRoutes
from moe_lightning.dispatch.row_format import RowFormat
from moe_lightning.dispatch.same_rows import SameRows

CHUNK_ROWS = 512
"""From so many rows on some rank on, rows travel in chunks if that is asked for: fewer are not
worth the collectives. Not measured."""


class LayerExperts(Protocol):
    """Some experts of one layer on this rank: an ``ExpertShard``, or what can stand for one."""

    @property
    def layer(self) -> int:
        """Decoder layer."""

    @property
    def experts(self) -> nn.Module:
        """The module whose parameters are trained; without rows if the rank has no experts."""

    def compute(self, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """The weighted sum for each row, as ``ExpertShard.compute``."""


class CollectiveDispatcher(Dispatcher):
    """Sends rows to the ranks that hold their experts, and adds up what comes back.

    Args:
        shard: The layer's experts on this rank; none is legal.
        num_experts: Logical experts of the layer.
        experts_of_slot: For each rank of the group its experts, in the order of its shard. Ranks
            may hold none or be left out, and several may hold the same expert.
        group: The ranks; a rank's number in it is its slot.
        same_rows_group: Ranks that hold the same rows (a tensor-parallel group): each sends its
            slice of them, and all get the whole output. None if this rank's rows are its own.
        num_chunks: Parts of the rows, the next of which travels while one is computed; for passes
            in which some rank has ``chunk_rows`` rows.
        chunk_rows: See ``num_chunks``.
        wire_dtype: Dtype of rows, sums and their gradients on their way; None for the rows' own.
        log: Where the layer's work is recorded while somebody looks. The bytes of "dispatch" left
            for other ranks with this rank's rows, those of "combine" came back with their sums:
            over all ranks, every row is counted once.
    """

    sends_rows_away = True

    def __init__(
        self,
        shard: LayerExperts,
        *,
        num_experts: int,
        experts_of_slot: Mapping[int, Sequence[int]],
        group: dist.ProcessGroup,
        log: RoutingLog,
        same_rows_group: dist.ProcessGroup | None = None,
        num_chunks: int = 1,
        chunk_rows: int = CHUNK_ROWS,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layer=shard.layer, num_experts=num_experts, log=log)
        self.shard = shard
        self.group = group
        self.num_chunks = num_chunks
        self.chunk_rows = chunk_rows
        self.wire_dtype = wire_dtype
        self._same_rows = None if same_rows_group is None else SameRows(same_rows_group)
        self._experts_of_slot = experts_of_slot
        self._slot = group.rank()
        self._names = tuple(f"rank {rank}" for rank in dist.get_process_group_ranks(group))
        self._routes: RankRoutes | None = None  # made where the first rows are

    @override
    def __call__(
        self,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        num_tokens, same_rows = hidden_TD.shape[0], self._same_rows
        if same_rows is not None:
            hidden_TD, index_TK, weights_TK = (
                same_rows.slice(tensor) for tensor in (hidden_TD, index_TK, weights_TK)
            )
        trace = self.log.open(
            self.layer,
            self.num_experts,
            index_TK,
            weights_TK,
            slots=self._names,
            home=self._slot,
        )
        out_TD = self._dispatch(hidden_TD, index_TK, weights_TK, meanwhile, trace)
        if same_rows is not None:
            out_TD = same_rows.gather(out_TD, num_tokens)
            trace.lap("combine", self._slot)
        self.log.close(trace)
        return out_TD

    def _dispatch(
        self,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        meanwhile: Callable[[], None] | None,
        trace: LayerTrace,
    ) -> Tensor:
        here = self._slot
        chunks = self._plan(hidden_TD, index_TK, weights_TK, trace)
        sizes = [chunk.num_tokens for chunk in chunks]
        hidden = torch.split(hidden_TD, sizes)
        weights = torch.split(weights_TK, sizes)

        def send(number: int) -> Tensor:
            exchange = chunks[number].exchange
            ticket = exchange.send(hidden[number], weights[number])
            trace.lap("dispatch", here, num_bytes=exchange.num_bytes_out)
            return ticket

        # The order of these calls is the order of the collectives on all ranks, and its reverse is
        # that of backward. One chunk is computed, the next one and the last one's sums travel.
        tickets, tickets_back = [send(0)], []
        for number, chunk in enumerate(chunks):
            if number + 1 < len(chunks):
                tickets.append(send(number + 1))
            if number == 0 and meanwhile is not None:
                meanwhile()
                trace.lap("compute", here)
            rows_RD, weights_RK, index_RK = chunk.exchange.receive(tickets[number])
            trace.lap("wait", here)
            sums_RD = self._compute(rows_RD, index_RK, weights_RK)
            trace.lap("compute", here)
            tickets_back.append(chunk.exchange.send_back(sums_RD))
            trace.lap("combine", here)
        parts = []
        for chunk, ticket in zip(chunks, tickets_back, strict=True):
            chunk.exchange.settle()
            trace.lap("wait", here)
            parts.append(chunk.exchange.receive_back(ticket, chunk.token_S))
            trace.lap("combine", here, num_bytes=chunk.exchange.num_bytes_back)
            for slot, num_rows in enumerate(chunk.exchange.num_sent):
                if slot != here:
                    trace.moved(here, slot, num_rows * chunk.exchange.format.num_bytes)
                    trace.moved(slot, here, num_rows * chunk.exchange.num_sum_bytes)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _plan(
        self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, trace: LayerTrace
    ) -> list["_Chunk"]:
        if self._routes is None:
            self._routes = RankRoutes(
                self.num_experts,
                self._experts_of_slot,
                num_slots=self.group.size(),
                device=index_TK.device,
            )
        routes = self._routes
        num_tokens, width = hidden_TD.shape
        ends = [num_tokens * c // self.num_chunks for c in range(self.num_chunks + 1)]
        sizes = [b - a for a, b in pairwise(ends)]
        message_bytes = 8 * (self.num_chunks + 1) * (self.group.size() - 1)
        slot_TK = routes.slots(index_TK)
        trace.goes_to(slot_TK)
        is_sent_PT = routes.is_sent(slot_TK)
        counts_PC = torch.stack(
            [part.sum(1) for part in torch.split(is_sent_PT, sizes, dim=1)], dim=1
        )
        # Each rank's number of rows goes along, so that all ranks agree on whether to chunk.
        sent_PX = torch.cat([counts_PC, torch.full_like(counts_PC[:, :1], num_tokens)], dim=1)
        received_PX = torch.empty_like(sent_PX)
        trace.lap("dispatch", self._slot, num_bytes=message_bytes)
        dist.all_to_all_single(received_PX, sent_PX, group=self.group)
        # The one read of the layer: NCCL and memory want the sizes on the host.
        sent, received = torch.stack([sent_PX, received_PX]).tolist()
        trace.lap("wait", self._slot)
        if max(row[-1] for row in received) < self.chunk_rows:
            ends = [0, num_tokens]
            sent, received = ([[sum(row[:-1])] for row in rows] for rows in (sent, received))
        format = RowFormat(
            width, self.wire_dtype or hidden_TD.dtype, index_TK.shape[1], weights_TK.dtype
        )
        chunks = []
        for number, (start, end) in enumerate(pairwise(ends)):
            picked = routes.pick(
                is_sent_PT[:, start:end],
                slot_TK[start:end],
                index_TK[start:end],
                num_sent=[row[number] for row in sent],
                num_received=[row[number] for row in received],
            )
            exchange = RowExchange(
                self.group,
                picked,
                num_tokens=end - start,
                format=format,
                dtype=hidden_TD.dtype,
            )
            chunks.append(_Chunk(end - start, picked.token_S, exchange))
        return chunks

    def _compute(self, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
        if rows_RD.shape[0] > 0:
            return self.shard.compute(rows_RD, index_RK, weights_RK)
        if not torch.is_grad_enabled():
            return torch.zeros_like(rows_RD)
        trained = [p for p in self.shard.experts.parameters() if p.requires_grad]
        return cast(Tensor, _NoRows.apply(rows_RD, weights_RK, *trained))  # type: ignore[no-untyped-call]


class _Chunk(NamedTuple):
    """Some of the layer's rows on this rank."""

    num_tokens: int
    token_S: Tensor
    exchange: RowExchange


class _NoRows(torch.autograd.Function):
    """The sums of no rows. Backward goes on through them, and the experts get a gradient of zero:
    whoever shares parameters with this rank waits for one."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_RK: Tensor, *trained: Tensor) -> Tensor:
        ctx.weights_shape = weights_RK.shape
        ctx.trained = [(tensor.shape, tensor.dtype) for tensor in trained]
        return torch.zeros_like(rows_RD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        grad_weights_RK = grad_RD.new_zeros(ctx.weights_shape)
        return (
            grad_RD,
            grad_weights_RK,
            *(grad_RD.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.trained),
        )
