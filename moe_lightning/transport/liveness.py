"""Which workers are alive: the master pings each from a thread of its own.

ping ─▶ answered in time ─▶ alive                       its connection closed, not back in 0.6 s ─┐
     ─▶ silence for timeout_s ─▶ lost, for ever ◀── it serves another session (was restarted) ◀───┘
"""

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

import zmq

from moe_lightning.transport.clock import AwakeClock
from moe_lightning.transport.keys import Keys
from moe_lightning.transport.pulse import Pulse, parse_pong, ping
from moe_lightning.transport.sockets import HANDSHAKE_FAILURES, Monitor, connect, has_message

_ROUND_S = 0.1
# A connection that was cut on the way is dialled anew after 50 ms; a killed worker's never is.
_BACK_WITHIN_S = 0.6


@dataclass(eq=False, slots=True)
class _Watched:
    worker: int
    name: str
    socket: "zmq.Socket[bytes]"
    monitor: Monitor
    heard_s: float
    num_pings: int = 0
    pulse: Pulse = field(default_factory=lambda: Pulse(0, 0, 0, 0, 0))
    # When its connection closed, and the last ping before that: answers to older ones don't count.
    cut_s: float | None = None
    cut_at_ping: int = 0
    was_refused: bool = False

    def close(self) -> None:
        if not self.socket.closed:
            self.monitor.close()
            self.socket.close(linger=0)


class Liveness:
    """Watches workers until they are lost. Any thread may ask.

    Args:
        session: The master's session, which the workers must be serving.
        timeout_s: Longest silence of a worker that lives.
        keys: The master's keys, if the workers have keys.
    """

    def __init__(self, *, session: int, timeout_s: float, keys: Keys | None = None) -> None:
        self._session = session
        self._timeout_s = timeout_s
        self._keys = keys
        self._interval_s = min(0.25, timeout_s / 8)
        self._round_s = min(_ROUND_S, self._interval_s)
        self._clock = AwakeClock(5 * self._round_s)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._lock = threading.Lock()
        self._watched: dict[int, _Watched] = {}
        self._lost: dict[int, str] = {}
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        self._thread.start()

    def watch(self, worker: int, name: str, pulse_address: str) -> None:
        """Begin to watch a worker that serves the session.

        Args:
            worker: Its number.
            name: What to call it in messages.
            pulse_address: Where it answers pings.
        """
        socket = connect(self._context, pulse_address, keys=self._keys, max_frame_bytes=1024)
        socket.reconnect_ivl = 50
        socket.reconnect_ivl_max = 0
        # Only the worker's end may close this connection: how long to bear silence is decided here.
        socket.heartbeat_ivl = socket.tcp_keepalive = socket.tcp_maxrt = 0
        monitor = Monitor(
            socket, zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | HANDSHAKE_FAILURES
        )
        socket.connect(pulse_address)
        with self._lock:
            self._watched[worker] = _Watched(worker, name, socket, monitor, self._clock.now_s)

    def lost(self, worker: int) -> str | None:
        """Whether a worker is lost.

        Args:
            worker: Its number.

        Returns:
            How that was noticed; None while it lives.
        """
        return self._lost.get(worker)

    def give_up(self, worker: int, reason: str) -> None:
        """Call a worker lost.

        Args:
            worker: Its number.
            reason: Why; the first reason stays.
        """
        with self._lock:
            self._lost.setdefault(worker, reason)

    def progress(self, worker: int) -> Pulse:
        """What a worker last said of itself.

        Args:
            worker: Its number, which is or was watched.

        Returns:
            That; all zeros if it has not said anything.
        """
        return self._watched[worker].pulse

    def close(self) -> None:
        """Stop watching."""
        if not self._is_closed.is_set():
            self._is_closed.set()
            self._thread.join()
            self._context.term()

    def _run(self) -> None:
        try:
            self._watch()
        finally:
            for each in self._watched.values():
                each.close()

    def _watch(self) -> None:
        next_ping_s = 0.0
        while not self._is_closed.is_set():
            with self._lock:
                watched = [w for w in self._watched.values() if not w.socket.closed]
            self._wait(watched)
            self._clock.tick()
            is_due = time.monotonic() >= next_ping_s
            if is_due:
                next_ping_s = time.monotonic() + self._interval_s
            for each in watched:
                self._hear(each, is_due=is_due)
                reason = self._reason(each)
                if reason is not None:
                    self.give_up(each.worker, reason)
                if each.worker in self._lost:
                    each.close()

    def _wait(self, watched: list[_Watched]) -> None:
        if not watched:  # a poller without sockets would not wait at all
            self._is_closed.wait(self._round_s)
            return
        poller = zmq.Poller()
        for each in watched:
            poller.register(each.socket, zmq.POLLIN)
            poller.register(each.monitor.socket, zmq.POLLIN)
        poller.poll(round(self._round_s * 1000))

    def _hear(self, watched: _Watched, *, is_due: bool) -> None:
        for event in watched.monitor.read():
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                is_due, watched.was_refused = True, False
            elif event != zmq.EVENT_DISCONNECTED:
                watched.was_refused = True
            elif watched.cut_s is None:
                watched.cut_s, watched.cut_at_ping = self._clock.now_s, watched.num_pings
        while has_message(watched.socket):
            frames = watched.socket.recv_multipart()
            pulse = parse_pong(frames[0])
            if pulse is None or pulse.number > watched.num_pings:
                continue
            watched.heard_s, watched.pulse = self._clock.now_s, pulse
            if pulse.number > watched.cut_at_ping:
                watched.cut_s = None
        if is_due:
            watched.num_pings += 1
            with suppress(zmq.Again):  # after a breach of protocol nothing can be sent any more
                watched.socket.send(ping(self._session, watched.num_pings), zmq.NOBLOCK)

    def _reason(self, watched: _Watched) -> str | None:
        now_s = self._clock.now_s
        if watched.pulse.number > 0 and watched.pulse.session != self._session:
            return "it serves this session no more (it gave up, or was restarted)"
        if watched.cut_s is not None and now_s - watched.cut_s > _BACK_WITHIN_S:
            return "it refused the keys" if watched.was_refused else "its connection closed"
        if now_s - watched.heard_s > self._timeout_s:
            return f"no sign of life for {self._timeout_s:g} s"
        return None
