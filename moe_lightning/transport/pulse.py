"""The pulse of a worker: a thread that answers pings, whatever the thread that computes is doing.

It has its own socket, context and I/O thread, so that a ping waits behind neither rows nor
requests.
"""

import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import zmq

from moe_lightning.transport.clock import AwakeClock
from moe_lightning.transport.keys import Keys
from moe_lightning.transport.sockets import admit, bind, endpoint

_PING = struct.Struct("<4sQQ")
_PONG = struct.Struct("<4sQQQQI")
_MAGIC = b"MoEP"
_MAX_FRAME_BYTES = 1024  # pings are shorter, but a handshake's messages have frames too
_ROUND_S = 0.1


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a worker says of itself.

    Args:
        number: The ping that it answers.
        session: The session that it serves; 0 if it is not the one that asks.
        bytes_read: Bytes of weights read so far.
        num_done: Requests done since it began.
        busy_ms: How long it has been at the present request; 0 if idle.
    """

    number: int
    session: int
    bytes_read: int
    num_done: int
    busy_ms: int


def ping(session: int, number: int) -> bytes:
    """Make a ping.

    Args:
        session: The master's session.
        number: The ping's number.

    Returns:
        Its bytes.
    """
    return _PING.pack(_MAGIC, session, number)


def parse_pong(raw: bytes) -> Pulse | None:
    """Read the answer to a ping.

    Args:
        raw: Its bytes.

    Returns:
        What it says, or None if it is none.
    """
    if len(raw) != _PONG.size or raw[:4] != _MAGIC:
        return None
    return Pulse(*_PONG.unpack(raw)[1:])


class PulseServer:
    """Answers pings from a thread of its own, from now on.

    Args:
        address: Where; port 0 takes any that is free.
        keys: The worker's keys; None admits everybody who reaches the address.
        progress: Bytes of weights read so far; called in the thread, must be quick.

    Raises:
        UsageError: If the address cannot be had.
    """

    def __init__(
        self, address: str, *, keys: Keys | None = None, progress: Callable[[], int] = lambda: 0
    ) -> None:
        self.num_done = 0
        self._busy_since: float | None = None
        self._progress = progress
        self._session = 0
        self._clock = AwakeClock(5 * _ROUND_S)
        self._heard_s = 0.0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = None if keys is None else admit(self._context, keys)
        self._is_closed = threading.Event()
        try:
            self._socket = bind(self._context, address, keys=keys, max_frame_bytes=_MAX_FRAME_BYTES)
        except BaseException:
            self._end_context()
            raise
        self.address = endpoint(self._socket)
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    @property
    def session(self) -> int:
        """The session that is served; 0 for none."""
        return self._session

    @session.setter
    def session(self, session: int) -> None:
        self._heard_s = self._clock.now_s
        self._session = session

    def silence_s(self) -> float:
        """Seconds since the session's last ping, or since it began; suspended time is not counted.

        Returns:
            The time.
        """
        return self._clock.now_s - self._heard_s

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Tell whoever asks that a request is being computed."""
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None
            self.num_done += 1

    def close(self) -> None:
        """Fall silent."""
        if not self._is_closed.is_set():
            self._is_closed.set()
            self._thread.join()
            self._end_context()

    def _run(self) -> None:
        self._socket.rcvtimeo = int(_ROUND_S * 1000)
        while not self._is_closed.is_set():
            self._clock.tick()
            try:
                peer, *frames = self._socket.recv_multipart()
                if len(frames) == 1:
                    self._answer(peer, frames[0])
            except zmq.Again:
                continue
        self._socket.close(linger=0)

    def _answer(self, peer: bytes, raw: bytes) -> None:
        if len(raw) != _PING.size or raw[:4] != _MAGIC:
            return
        _magic, session, number = _PING.unpack(raw)
        is_ours = session == self._session
        if is_ours:
            self._heard_s = self._clock.now_s
        since = self._busy_since
        busy_ms = 0 if since is None else max(1, round((time.monotonic() - since) * 1000))
        said = (number, session if is_ours else 0, self._progress(), self.num_done, busy_ms)
        self._socket.send_multipart([peer, _PONG.pack(_MAGIC, *said)])

    def _end_context(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()
