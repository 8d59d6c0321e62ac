"""RowExchange: rows of one layer to the ranks that hold their experts, and weighted sums back.

    sender                                       receiver
    hidden_TD ─ pick ─ pack ─▶ all-to-all ─ unpack ─▶ rows_RD, weights_RK, index_RK
    out_TD ◀─ add up ─ unpack ─ all-to-all ◀── pack ── sums_RD

Backward takes the same two ways in the opposite direction. Each of the four steps is an autograd
function of its own, so that between a step that sends and the one that receives other work can be
done, in forward and, since autograd runs strictly in the reverse order of the program, in backward.
That order also gives every rank the same order of collectives. A rank without rows has the same
four steps in its graph as any other.

Which rows go where is not decided here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lightning.dispatch.flight import Flight
from moe_lightning.dispatch.row_format import RowFormat


@dataclass(frozen=True, slots=True)
class Picked:
    """The rows that a rank sends, in the order of the ranks that they go to.

    Attributes:
        token_S: Token of each row; ascending for each rank.
        index_SK: *Local* experts of each row at the rank that it goes to.
        num_sent: Rows for each rank.
        num_received: Rows from each rank.
    """

    token_S: Tensor
    index_SK: Tensor
    num_sent: list[int]
    num_received: list[int]


class RowExchange:
    """One exchange of rows, there and back. All ranks of the group call all four methods in turn.

    Args:
        group: The ranks.
        picked: The rows that this rank sends.
        num_tokens: T, of this rank.
        format: How a row is laid out on the wire.
        dtype: Dtype of the rows and sums outside of the wire.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        picked: Picked,
        *,
        num_tokens: int,
        format: RowFormat,
        dtype: torch.dtype,
    ) -> None:
        self.group = group
        self.num_tokens = num_tokens
        self.format = format
        self.dtype = dtype
        self.num_sent = picked.num_sent
        self.num_received = picked.num_received
        self._num_rows_away = sum(picked.num_sent) - picked.num_sent[group.rank()]
        self._picked: Picked | None = picked
        self._flight: Flight | None = None

    @property
    def num_bytes_out(self) -> int:
        """Bytes that leave for other ranks with this rank's rows."""
        return self._num_rows_away * self.format.num_bytes

    @property
    def num_bytes_back(self) -> int:
        """Bytes that come back from other ranks with their sums."""
        return self._num_rows_away * self.num_sum_bytes

    @property
    def num_sum_bytes(self) -> int:
        """Bytes of one sum on its way back."""
        return self.format.width * self.format.dtype.itemsize

    def send(self, hidden_TD: Tensor, weights_TK: Tensor) -> Tensor:
        """Send this rank's rows on their way.

        Args:
            hidden_TD: This rank's rows.
            weights_TK: Their router weights.

        Returns:
            What :meth:`receive` asks for; it ties the two together in the graph.
        """
        assert self._picked is not None, "an exchange sends once"
        picked, self._picked = self._picked, None
        return cast(
            Tensor, _call(_Send, self, picked.index_SK, picked.token_S, hidden_TD, weights_TK)
        )

    def receive(self, ticket: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Wait for the rows of all ranks.

        Args:
            ticket: What :meth:`send` gave.

        Returns:
            The rows ``[R, D]``, their router weights ``[R, K]`` and local experts ``[R, K]`` int64.
        """
        return cast(tuple[Tensor, Tensor, Tensor], _call(_Receive, self, ticket))

    def send_back(self, sums_RD: Tensor) -> Tensor:
        """Send the weighted sums of the received rows on their way back.

        Args:
            sums_RD: One sum for each received row.

        Returns:
            What :meth:`receive_back` asks for.
        """
        return cast(Tensor, _call(_SendBack, self, sums_RD))

    def receive_back(self, ticket: Tensor, token_S: Tensor) -> Tensor:
        """Wait for the sums of this rank's rows and add them up.

        Args:
            ticket: What :meth:`send_back` gave.
            token_S: Token of each row that was sent.

        Returns:
            ``[T, D]``; zero for a row that was sent nowhere.
        """
        return cast(Tensor, _call(_ReceiveBack, self, token_S, ticket))

    def settle(self) -> None:
        """Wait until what is on its way is there, and leave it to the next step."""
        if self._flight is not None:
            self._flight.wait()

    # What the steps do, without a gradient: forward and backward are made of these.

    def post_out(self, bytes_SX: Tensor) -> None:
        """Start the way from this rank's rows to their experts' ranks."""
        self._post(bytes_SX, self.num_sent, self.num_received)

    def post_back(self, bytes_RX: Tensor) -> None:
        """Start the way from the experts' ranks back to the rows'."""
        self._post(bytes_RX, self.num_received, self.num_sent)

    def arrived(self) -> Tensor:
        """Wait for what was posted last."""
        assert self._flight is not None, "nothing is on its way"
        flight, self._flight = self._flight, None
        return flight.wait()

    def add_up(self, rows_SX: Tensor, token_S: Tensor, dtype: torch.dtype) -> Tensor:
        """Add what came back to its tokens, ``[T, X]``, always in the order of the ranks."""
        exact = torch.promote_types(rows_SX.dtype, torch.float32)
        sum_TX = torch.zeros(self.num_tokens, rows_SX.shape[1], dtype=exact, device=rows_SX.device)
        if len(self.num_sent) * self.num_tokens == 0:
            return sum_TX.to(dtype)
        tokens = torch.split(token_S, self.num_sent)
        parts = torch.split(rows_SX.to(exact), self.num_sent)
        for token_R, part_RX in zip(tokens, parts, strict=True):
            if token_R.numel():
                sum_TX.index_add_(0, token_R, part_RX)
        return sum_TX.to(dtype)

    def _post(self, bytes_X: Tensor, num_out: Sequence[int], num_in: Sequence[int]) -> None:
        assert self._flight is None, "an exchange has one thing on its way at a time"
        self._flight = Flight(bytes_X, num_out, num_in, self.group)


def _as_bytes(rows_RD: Tensor, dtype: torch.dtype) -> Tensor:
    return rows_RD.to(dtype).contiguous().view(torch.uint8)


def _call(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Apply a function; without gradients, and their overhead, where none can be asked for."""
    if torch.is_grad_enabled():
        return function.apply(*args)  # type: ignore[no-untyped-call]
    return function.forward(_NO_CONTEXT, *args)


class _NoContext:
    """What a function's forward remembers where there will be no backward: nothing."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def __setattr__(self, name: str, value: object) -> None:
        pass


_NO_CONTEXT = _NoContext()


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        exchange: RowExchange,
        index_SK: Tensor,
        token_S: Tensor,
        hidden_TD: Tensor,
        weights_TK: Tensor,
    ) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(token_S)
        rows_SX = exchange.format.pack(hidden_TD[token_S], weights_TK[token_S], index_SK)
        exchange.post_out(rows_SX)
        return hidden_TD.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        exchange: RowExchange = ctx.exchange
        (token_S,) = ctx.saved_tensors
        rows_SD, weights_SK, _index = exchange.format.views(exchange.arrived())
        return (
            None,
            None,
            None,
            exchange.add_up(rows_SD, token_S, exchange.dtype),
            exchange.add_up(weights_SK, token_S, exchange.format.weights_dtype),
        )


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: RowExchange, ticket: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.exchange = exchange
        rows_RD, weights_RK, index_RK = exchange.format.views(exchange.arrived())
        index_RK = index_RK.to(torch.int64)
        ctx.mark_non_differentiable(index_RK)
        return rows_RD.to(exchange.dtype), weights_RK, index_RK

    @staticmethod
    def backward(
        ctx: Any, grad_rows_RD: Tensor, grad_weights_RK: Tensor, _: Tensor
    ) -> tuple[None, Tensor]:
        exchange: RowExchange = ctx.exchange
        exchange.post_back(exchange.format.pack(grad_rows_RD, grad_weights_RK, None))
        return None, grad_rows_RD.new_zeros(())


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: RowExchange, sums_RD: Tensor) -> Tensor:
        ctx.exchange = exchange
        exchange.post_back(_as_bytes(sums_RD, exchange.format.dtype))
        return sums_RD.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, Tensor]:
        exchange: RowExchange = ctx.exchange
        return None, exchange.arrived().view(exchange.format.dtype).to(exchange.dtype)


class _ReceiveBack(torch.autograd.Function):
    """The last step saves a tensor on every rank, rows or not. Activation checkpointing recomputes
    until everything that was saved is there again, so each rank recomputes all four steps."""

    @staticmethod
    def forward(ctx: Any, exchange: RowExchange, token_S: Tensor, ticket: Tensor) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(token_S)
        sums_SD = exchange.arrived().view(exchange.format.dtype)
        return exchange.add_up(sums_SD, token_S, exchange.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out_TD: Tensor) -> tuple[None, None, Tensor]:
        exchange: RowExchange = ctx.exchange
        (token_S,) = ctx.saved_tensors
        exchange.post_out(_as_bytes(grad_out_TD[token_S], exchange.format.dtype))
        return None, None, grad_out_TD.new_zeros(())
