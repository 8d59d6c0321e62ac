"""One message of rows to a worker, and the sums that come back."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import Buffer

from moe_lightning.transport.messages import (
    Compute,
    FailureCode,
    MalformedMessage,
    Sums,
    WireDtype,
    parse,
)
from moe_lightning.transport.transport import Pending, WorkerLost
from moe_lightning.transport.wire import (
    WireDtypeName,
    buffer_of,
    decode,
    encode,
    from_torch,
    relative_error,
    wire_dtype,
)

MESSAGE_BYTES = 16 * 2**20
ANSWER_TIMEOUT_S = 600.0  # of a worker that is alive but never done


@dataclass(slots=True)
class WireOptions:
    """How rows travel.

    Attributes:
        dispatch_dtype: Of rows on their way to workers.
        combine_dtype: Of sums on their way back.
        message_bytes: Rows of more bytes go in several messages, and a worker computes the first
            ones while the next are on their way.
        errors: Largest relative error of either direction, once compressed rows were measured; the
            first message of each layer is.
    """

    dispatch_dtype: WireDtypeName = "working"
    combine_dtype: WireDtypeName = "working"
    message_bytes: int = MESSAGE_BYTES
    errors: dict[str, float] = field(default_factory=dict)

    def note(self, direction: str, error: float) -> None:
        """Keep the largest error; not a number means that it was not measured."""
        if not math.isnan(error):
            self.errors[direction] = max(error, self.errors.get(direction, 0.0))


@dataclass(frozen=True, slots=True)
class Question:
    """A message and what its answer must look like.

    Attributes:
        request: Its number.
        frames: The message; they keep the rows' memory alive.
        num_bytes: Their size.
        shape: Shape of the sums.
        dtype: Dtype of the sums.
        sums_dtype: Their dtype on the wire.
        device: Where they go.
        wire: Where errors are noted.
    """

    request: int
    frames: Sequence[Buffer]
    num_bytes: int
    shape: tuple[int, int]
    dtype: torch.dtype
    sums_dtype: WireDtype
    device: torch.device
    wire: WireOptions


class Questions:
    """Puts rows into messages.

    Args:
        session: The run.
        wire: How rows travel.
        ids: Where numbers of requests come from.
        device: Where rows are, and sums go.
    """

    def __init__(
        self, session: int, wire: WireOptions, *, ids: Iterator[int], device: torch.device
    ) -> None:
        self._session = session
        self._wire = wire
        self._ids = ids
        self._device = device
        self._is_measured: set[int] = set()

    def put(self, layer: int, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Question:
        """The question of some rows.

        Args:
            layer: Decoder layer.
            rows_RD: Rows.
            index_RK: Logical experts; the layer's number of experts stands for "not yours".
            weights_RK: Router weights.

        Returns:
            The question.
        """
        wire, dtype = self._wire, rows_RD.dtype
        rows_dtype = wire_dtype(wire.dispatch_dtype, dtype)
        sums_dtype = wire_dtype(wire.combine_dtype, dtype)
        encoded = encode(rows_RD, rows_dtype)
        is_compressed = {wire.dispatch_dtype, wire.combine_dtype} != {"working"}
        wants_error = is_compressed and layer not in self._is_measured
        if wants_error:
            self._is_measured.add(layer)
            wire.note("dispatch", relative_error(rows_RD, encoded))
        request = next(self._ids)
        frames = Compute(
            self._session,
            request,
            layer,
            num_rows=rows_RD.shape[0],
            num_choices=index_RK.shape[1],
            width=rows_RD.shape[1],
            dtype=from_torch(dtype),
            rows_dtype=rows_dtype,
            sums_dtype=sums_dtype,
            weights_dtype=from_torch(weights_RK.dtype),
            wants_error=wants_error,
            rows=buffer_of(encoded.rows),
            scales=memoryview(b"") if encoded.scales is None else buffer_of(encoded.scales),
            index=buffer_of(index_RK.to("cpu", torch.int16).contiguous()),
            weights=buffer_of(weights_RK.to("cpu").contiguous()),
        ).frames()
        return Question(
            request,
            frames,
            sum(memoryview(frame).nbytes for frame in frames),
            (rows_RD.shape[0], rows_RD.shape[1]),
            dtype,
            sums_dtype,
            self._device,
            wire,
        )


class WorkerFlight:
    """Rows on their way to a worker and back (dispatch.Flight).

    Args:
        worker: Who was asked.
        question: What.
        pending: What the answer is waited for with.
        give_up: Called if the worker answers with what is no answer.
    """

    def __init__(
        self,
        worker: int,
        question: Question,
        pending: Pending,
        *,
        give_up: Callable[[int, str], None],
    ) -> None:
        self.num_bytes_sent = question.num_bytes
        self.num_bytes_received = 0
        self.compute_s = 0.0
        self._worker = worker
        self._question = question
        self._pending = pending
        self._give_up = give_up

    def result(self) -> Tensor:
        """Wait for the sums.

        Returns:
            ``[R, D]`` on the device of the rows.

        Raises:
            WorkerLost: If the worker is gone, or answers no questions.
            RuntimeError: If it could not compute these rows.
        """
        try:
            answer = parse(self._pending.result(ANSWER_TIMEOUT_S))
        except TimeoutError:
            raise self._lost(f"it gave no answer for {ANSWER_TIMEOUT_S:.0f} s") from None
        except MalformedMessage as error:
            raise self._lost(f"its answer makes no sense: {error}") from error
        asked = self._question
        if isinstance(answer, Sums):
            is_ours = (
                answer.request == asked.request
                and (answer.num_rows, answer.width) == asked.shape
                and answer.sums_dtype == asked.sums_dtype
            )
            if not is_ours:
                raise self._lost("its answer is to another question")
            return self._take(answer)
        if getattr(answer, "code", None) is FailureCode.COMPUTE:
            raise RuntimeError(f"worker {self._worker}: {getattr(answer, 'text', '')}")
        raise self._lost(f"it refused: {getattr(answer, 'text', 'no sums')}")

    def _take(self, sums: Sums) -> Tensor:
        asked = self._question
        self.compute_s = sums.compute_us / 1e6
        self.num_bytes_received = sums.rows.nbytes + sums.scales.nbytes
        asked.wire.note("combine", sums.error)
        sums_RD = decode(
            sums.rows, sums.scales, sums.num_rows, sums.width, sums.sums_dtype, asked.dtype
        )
        return sums_RD.to(asked.device, non_blocking=True)

    def _lost(self, reason: str) -> WorkerLost:
        self._give_up(self._worker, reason)
        return WorkerLost(self._worker, reason)


class Flights:
    """Rows that went in several messages (dispatch.Flight).

    Args:
        parts: The messages' flights, in the order of the rows.
    """

    def __init__(self, parts: Sequence[WorkerFlight]) -> None:
        self._parts = parts

    @property
    def num_bytes_sent(self) -> int:
        """Bytes of all messages."""
        return sum(part.num_bytes_sent for part in self._parts)

    @property
    def num_bytes_received(self) -> int:
        """Bytes of all answers that are there."""
        return sum(part.num_bytes_received for part in self._parts)

    @property
    def compute_s(self) -> float:
        """How long the worker computed in all."""
        return sum(part.compute_s for part in self._parts)

    def result(self) -> Tensor:
        """Wait for all sums, as :meth:`WorkerFlight.result` does."""
        return torch.cat([part.result() for part in self._parts])
