"""The worker's end: one socket, and requests done one by one in the thread that serves."""

import logging
import time
from collections.abc import Callable, Sequence

import zmq
from typing_extensions import Buffer

from moe_lightning.transport.drop_log import DropLog
from moe_lightning.transport.keys import Keys
from moe_lightning.transport.messages import MAX_FRAMES
from moe_lightning.transport.sockets import (
    HANDSHAKE_FAILURES,
    MAX_FRAME_BYTES,
    Monitor,
    admit,
    bind,
    endpoint,
)

Handler = Callable[[list[memoryview]], Sequence[Buffer] | None]
"""Answers a message, or drops it (None)."""

_IDLE_S = 0.2
# The last answers (to "bye") get this long to leave.
_LINGER_MS = 500


class ZmqServer:
    """Listens for requests; requests that arrive during another wait in zmq's own thread.

    Args:
        address: Where; port 0 takes any that is free.
        keys: The worker's keys; None admits everybody who reaches the address.
        max_frame_bytes: A peer with a longer frame is disconnected before that is allocated.

    Raises:
        UsageError: If the address cannot be had.
    """

    def __init__(
        self, address: str, *, keys: Keys | None = None, max_frame_bytes: int = MAX_FRAME_BYTES
    ) -> None:
        self._max_frame_bytes = max_frame_bytes
        logger = logging.getLogger("moe_lightning.worker")
        self._dropped = DropLog(logger)
        self._ended = DropLog(logger, level=logging.INFO)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = None if keys is None else admit(self._context, keys)
        try:
            self._socket = bind(self._context, address, keys=keys, max_frame_bytes=max_frame_bytes)
        except BaseException:
            self._end_context()
            raise
        self._socket.rcvtimeo = int(_IDLE_S * 1000)
        self._monitor = Monitor(self._socket, HANDSHAKE_FAILURES | zmq.EVENT_DISCONNECTED)
        self.address = endpoint(self._socket)

    def serve(self, handle: Handler, on_idle: Callable[[], bool]) -> None:
        """Answer requests until told to leave.

        Args:
            handle: Answers one. What it raises is logged, and the request dropped.
            on_idle: Called between requests, at least every 0.2 s while there are none; False
                leaves.
        """
        idle_at = 0.0
        while True:
            sender, frames = self._receive()
            if frames:
                self._answer(sender, frames, handle)
            del frames  # up to hundreds of megabytes, not to be held until the next request
            now = time.monotonic()
            if not sender or now >= idle_at:
                self._log_strangers()
                if not on_idle():
                    return
                idle_at = now + _IDLE_S

    def close(self) -> None:
        """Stop listening. Answers that are on their way get half a second."""
        if not self._socket.closed:
            self._monitor.close()
            self._socket.close(linger=_LINGER_MS)
            self._end_context()

    def _receive(self) -> tuple[bytes, list[memoryview]]:
        """Wait for a message; without one in time, all is empty."""
        try:
            sender = self._socket.recv()
        except zmq.Again:
            return b"", []
        frames: list[memoryview] = []
        is_last = not self._socket.get(zmq.RCVMORE)
        num_frames = 0
        while not is_last:
            frame = self._socket.recv(copy=False)
            is_last = not frame.more
            num_frames += 1
            if num_frames <= MAX_FRAMES:
                frames.append(frame.buffer)
        if 0 < num_frames <= MAX_FRAMES:
            return sender, frames
        self._dropped("Dropped a message with a wrong number of frames", str(num_frames))
        return sender, []

    def _answer(self, sender: bytes, frames: list[memoryview], handle: Handler) -> None:
        try:
            answer = handle(frames)
        except Exception as error:
            self._dropped("Dropped a request that could not be handled", f"{error!r:.200}")
            return
        if answer is None:
            return
        longest = max((memoryview(frame).nbytes for frame in answer), default=0)
        if longest > self._max_frame_bytes:  # the master would hang up, and ask again for ever
            self._dropped("Dropped an answer that is too long", f"a frame of {longest:,} bytes")
        else:
            # A peer that is gone, or that does not read, misses its answer: nobody waits for it.
            self._socket.send_multipart([sender, *answer], copy=False)

    def _log_strangers(self) -> None:
        for event in self._monitor.read():
            if event == zmq.EVENT_DISCONNECTED:
                # libzmq does not tell one end from the other.
                self._ended("A connection ended: a master left, or broke a rule (length of frames)")
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._dropped("Refused a connection whose key is not the master's")
            else:
                self._dropped("Refused a connection that has other keys, or is no master's")

    def _end_context(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()
