"""The master's end of `zmq`: each thread that asks has its own line to each worker.

thread 1 ─┬─ line ──▶ worker 1      Nothing is handed between threads, so the way of a request is:
          └─ line ──▶ worker 2      send, wait, take. While a thread waits on one line, the answers
thread 2 ─┬─ line ──▶ worker 1      of the others wait in their sockets.
          └─ line ──▶ worker 2
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakSet

import zmq
from typing_extensions import override

from moe_lightning.transport.keys import Keys
from moe_lightning.transport.sockets import MAX_FRAME_BYTES, Monitor, connect
from moe_lightning.transport.transport import ExpertTransport, Frames, Pending, WorkerLost
from moe_lightning.transport.zmq_line import EVENTS, Line, Question

_SLICE_S = 0.05
_MAX_IO_THREADS = 4
_CLOSED = "the transport was closed"


class ZmqTransport(ExpertTransport):
    """Asks workers over TCP or ipc, with CURVE if there are keys.

    Args:
        addresses: Of each worker, in the order of their numbers.
        keys: The master's keys, if the workers have keys.
        lost: Whether a worker is known to be gone, and why.
        max_frame_bytes: The longest frame of a request and of an answer.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        keys: Keys | None = None,
        lost: Callable[[int], str | None] = lambda worker: None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self.addresses = tuple(addresses)
        self.lost = lost
        self._keys = keys
        self._max_frame_bytes = max_frame_bytes
        # A core encrypts less than a network carries, so that connections share a few.
        num_threads = 1 if keys is None else max(1, min(_MAX_IO_THREADS, len(addresses)))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(num_threads)
        self._local = threading.local()
        self._desks: WeakSet[_Desk] = WeakSet()
        self._lock = threading.Lock()
        self._is_closed = False

    @override
    def ask(self, worker: int, request: int, frames: Frames) -> Pending:
        reason = _CLOSED if self._is_closed else self.lost(worker)
        if reason is not None:
            raise WorkerLost(worker, reason)
        longest = max(memoryview(frame).nbytes for frame in frames)
        assert longest <= self._max_frame_bytes, f"a frame of {longest} bytes: split the request"
        pending = _ZmqPending(self, self._desk(worker), worker, Question(request, frames))
        pending.ask()
        return pending

    @override
    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            desks = list(self._desks)
        for desk in desks:  # a thread that waits lets go of its desk within a slice
            desk.close()
        self._context.term()

    def _desk(self, worker: int) -> "_Desk":
        desk: _Desk | None = getattr(self._local, "desk", None)
        if desk is None:
            with self._lock:
                if self._is_closed:
                    raise WorkerLost(worker, _CLOSED)
                desk = self._local.desk = _Desk(self._dial)
                self._desks.add(desk)
        return desk

    def _dial(self, worker: int) -> tuple["zmq.Socket[bytes]", Monitor]:
        address = self.addresses[worker]
        socket = connect(
            self._context, address, keys=self._keys, max_frame_bytes=self._max_frame_bytes
        )
        monitor = Monitor(socket, EVENTS)
        socket.connect(address)
        return socket, monitor


class _Desk:
    """The lines of one thread. The lock is for `close`, which comes from another."""

    def __init__(self, dial: Callable[[int], tuple["zmq.Socket[bytes]", Monitor]]) -> None:
        self.lock = threading.Lock()
        self.is_closed = False
        self.lines: dict[int, Line] = {}
        self._dial = dial

    def line(self, worker: int) -> Line:
        """The line to a worker; the lock is held."""
        if self.is_closed:
            raise WorkerLost(worker, _CLOSED)
        if worker not in self.lines:
            self.lines[worker] = Line(partial(self._dial, worker))
        return self.lines[worker]

    def close(self) -> None:
        with self.lock:
            self.is_closed = True
            for line in self.lines.values():
                line.close()
            self.lines.clear()

    def __del__(self) -> None:
        self.close()  # its thread has ended


class _ZmqPending(Pending):
    def __init__(
        self, transport: ZmqTransport, desk: _Desk, worker: int, question: Question
    ) -> None:
        self._transport = transport
        self._desk = desk
        self._worker = worker
        self._question = question

    def ask(self) -> None:
        with self._desk.lock:
            self._desk.line(self._worker).ask(self._question)

    @override
    def result(self, timeout_s: float) -> list[memoryview]:
        deadline = time.monotonic() + timeout_s
        while self._question.answer is None:
            reason = self._transport.lost(self._worker)
            left_s = deadline - time.monotonic()
            is_over = reason is not None or left_s <= 0
            with self._desk.lock:
                line = self._desk.line(self._worker)
                if not line.take(0.0 if is_over else min(left_s, _SLICE_S)):
                    for each in self._desk.lines.values():
                        each.mend()
                elif is_over:
                    continue  # others' answers may be before ours
            if self._question.answer is None and reason is not None:
                raise WorkerLost(self._worker, reason)
            if self._question.answer is None and is_over:
                raise TimeoutError(
                    f"worker {self._worker} ({self._transport.addresses[self._worker]}) gave no "
                    f"answer in {timeout_s:g} s{f': {line.trouble}' if line.trouble else ''}"
                )
        return self._question.answer
