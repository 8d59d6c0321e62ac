"""ZeroMQ sockets as all of this package needs them: limits, keys, and what becomes of connections.

A context (and so an I/O thread) belongs to whoever made it: pulses do not wait behind rows.
"""

import struct
from collections.abc import Iterator
from secrets import token_hex

import zmq
from zmq.auth.thread import ThreadAuthenticator

from moe_lightning.errors import UsageError
from moe_lightning.transport.addresses import numeric
from moe_lightning.transport.keys import Keys

MAX_FRAME_BYTES = 256 * 2**20

# A frame that needs longer than this to arrive would be taken for a silent peer.
_SILENCE_MS = 30_000
# What a stranger can make a listener hold is what his link carries in this time.
_HANDSHAKE_MS = 5_000
_ZAP_DOMAIN = b"worker"

HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


def connect(
    context: "zmq.Context[zmq.Socket[bytes]]",
    address: str,
    *,
    keys: Keys | None,
    max_frame_bytes: int = MAX_FRAME_BYTES,
) -> "zmq.Socket[bytes]":
    """Make a DEALER that (re)connects by itself and never blocks its owner.

    Args:
        context: Its context.
        address: Whom to talk to.
        keys: The master's keys; None for a worker without keys.
        max_frame_bytes: The longest frame that is taken in.

    Returns:
        The socket, not yet connected: call its `connect` when it is watched.
    """
    socket = context.socket(zmq.DEALER)
    _set_limits(socket, max_frame_bytes)
    socket.reconnect_ivl = 100
    socket.reconnect_ivl_max = 1000
    socket.connect_timeout = 5000
    socket.heartbeat_ivl = 5000
    socket.heartbeat_timeout = _SILENCE_MS
    if keys is not None:
        socket.curve_publickey = keys.public
        socket.curve_secretkey = keys.secret
        socket.curve_serverkey = keys.peer
    socket.ipv6 = "[" in address
    return socket


def bind(
    context: "zmq.Context[zmq.Socket[bytes]]",
    address: str,
    *,
    keys: Keys | None,
    max_frame_bytes: int = MAX_FRAME_BYTES,
) -> "zmq.Socket[bytes]":
    """Make a ROUTER that listens.

    Args:
        context: Its context. With keys, `admit` must have been called for it.
        address: Where; port 0 takes any that is free.
        keys: The worker's keys; None admits everybody who reaches the address.
        max_frame_bytes: A peer with a longer frame is disconnected before that is allocated.

    Returns:
        The socket; `endpoint` has the real port.

    Raises:
        UsageError: If the address cannot be had.
    """
    number = numeric(address)
    socket = context.socket(zmq.ROUTER)
    _set_limits(socket, max_frame_bytes)
    if keys is not None:
        socket.curve_server = True
        socket.curve_publickey = keys.public
        socket.curve_secretkey = keys.secret
        # With a domain, nobody is let in if the authenticator is not there to ask.
        socket.zap_domain = _ZAP_DOMAIN
    socket.ipv6 = "[" in number
    try:
        socket.bind(number)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        if error.errno == zmq.EADDRINUSE:
            raise UsageError(
                f"{address}: another program listens there already. End it, or give another port "
                "(port 0 takes one that is free)."
            ) from error
        raise UsageError(
            f"{address}: cannot be listened on ({error.strerror}). Give an address of this machine."
        ) from error
    return socket


def endpoint(socket: "zmq.Socket[bytes]") -> str:
    """Return the address that a socket listens on.

    Args:
        socket: What `bind` returned.

    Returns:
        The address, with the real port.
    """
    address = socket.get(zmq.LAST_ENDPOINT)
    assert isinstance(address, bytes)
    return address.decode()


def has_message(socket: "zmq.Socket[bytes]") -> bool:
    """Whether a message is there to be received.

    Args:
        socket: Any socket.

    Returns:
        The answer, without waiting.
    """
    return bool(int(socket.get(zmq.EVENTS)) & zmq.POLLIN)


def admit(context: "zmq.Context[zmq.Socket[bytes]]", keys: Keys) -> ThreadAuthenticator:
    """Let nobody but the holder of the peer's secret key into the sockets of a context.

    Args:
        context: The context.
        keys: The keys of this side.

    Returns:
        The running authenticator, to be stopped before the context ends.
    """
    authenticator = ThreadAuthenticator(context)
    authenticator.configure_curve_callback(_ZAP_DOMAIN.decode(), _Only(keys.peer))
    authenticator.start()
    return authenticator


class _Only:
    def __init__(self, key: bytes) -> None:
        self._key = key

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._key


class Monitor:
    """What happens to the connections of a socket.

    Args:
        socket: The socket, before it connects or binds.
        events: Which `zmq.EVENT_*` to tell of.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", events: int) -> None:
        address = f"inproc://monitor-{token_hex(8)}"
        self._watched = socket
        self._watched.monitor(address, events)
        self.socket = socket.context.socket(zmq.PAIR)
        # libzmq waits for room for an event, and its I/O thread must never wait.
        self.socket.rcvhwm = 0
        self.socket.connect(address)

    def read(self) -> Iterator[int]:
        """Yield what has happened since the last call, without waiting."""
        while has_message(self.socket):
            event, _value = struct.unpack("=HI", self.socket.recv_multipart()[0])
            yield event

    def close(self) -> None:
        """Stop; before the socket itself is closed, whose I/O thread would wait for a reader."""
        if not self._watched.closed:
            self._watched.monitor(None, 0)
        self.socket.close(linger=0)


def _set_limits(socket: "zmq.Socket[bytes]", max_frame_bytes: int) -> None:
    socket.linger = 0
    socket.maxmsgsize = max_frame_bytes
    # No limit to the number of messages: a full ROUTER drops answers, and one that holds back what
    # it receives takes its whole process with it when that peer dies with a heartbeat under way
    # (libzmq 4.3.5: "Assertion failed: !_io_error"). Whoever is past the handshake is trusted not
    # to flood; what is in flight is the asker's choice.
    socket.sndhwm = 0
    socket.rcvhwm = 0
    socket.handshake_ivl = _HANDSHAKE_MS
    # The kernel finds peers that are gone without a word, whether or not something is under way.
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = 5
    socket.tcp_keepalive_intvl = 2
    socket.tcp_keepalive_cnt = 4
    socket.tcp_maxrt = 15_000
