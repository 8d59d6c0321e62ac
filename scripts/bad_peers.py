"""Peers that speak ZMTP badly, or something else: what fuzz_worker.py sends through raw sockets.

A conversation is the list of what a peer sends, one after another, whatever it is answered:
a greeting of 64 bytes, a command READY (or a handshake of CURVE), and frames of a flag byte, a
length of 1 or 8 bytes, and that many bytes (https://rfc.zeromq.org/spec/37).
"""

import random

Conversation = list[bytes]

MORE, LONG, COMMAND = 1, 2, 4
# Of the messages that never end: what a peer sends of them before it hangs up.
ENDLESS_BYTES = 4 * 2**20

_OTHERS = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(506),  # TLS
    b"*1\r\n$4\r\nPING\r\n",
    b"\x00\x00\x00\x00\x00\x00\x00\x00",
    b"\xff" * 5000,
    b"\x01\x00",  # ZMTP 1
    b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x01\x05",  # ZMTP 2
]
_LENGTHS = [0, 1, 254, 255, 256, 2**16, 2**20, 2**28, 2**28 + 1, 2**31 - 1, 2**31, 2**32]
_LENGTHS += [2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def greeting(*, version: bytes = b"\3\0", mechanism: bytes = b"NULL", as_server: int = 0) -> bytes:
    """The first 64 bytes of a peer."""
    signature = b"\xff" + bytes(8) + b"\x7f"
    return signature + version + mechanism.ljust(20, b"\0")[:20] + bytes([as_server]) + bytes(31)


def frame(body: bytes, *, flags: int = 0, length: int | None = None) -> bytes:
    """A frame, which may claim another length than it has."""
    length = len(body) if length is None else length
    if length > 255 or flags & LONG:
        return bytes([flags | LONG]) + (length % 2**64).to_bytes(8, "big") + body
    return bytes([flags, length]) + body


def command(name: bytes, body: bytes = b"") -> bytes:
    """A command: a frame with a name."""
    return frame(bytes([len(name)]) + name + body, flags=COMMAND)


def ready(socket_type: bytes = b"DEALER") -> bytes:
    """The command that ends a handshake without keys."""
    properties = ((b"Socket-Type", socket_type), (b"Identity", b""))
    return command(b"READY", b"".join(_property(*each) for each in properties))


def message(frames: list[bytes]) -> bytes:
    """A message of frames, as it is on the wire."""
    last = len(frames) - 1
    return b"".join(frame(each, flags=MORE * (i < last)) for i, each in enumerate(frames))


def _property(name: bytes, value: bytes, length: int | None = None) -> bytes:
    length = len(value) if length is None else length
    return bytes([len(name)]) + name + (length % 2**32).to_bytes(4, "big") + value


class BadPeers:
    """An endless source of conversations.

    Args:
        rng: Where the choices come from.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.kinds = {
            "noise": self.noise,
            "another protocol": self.another_protocol,
            "a bad greeting": self.bad_greeting,
            "a bad handshake": self.bad_handshake,
            "a bad handshake of CURVE": self.bad_curve,
            "bad frames": self.bad_frames,
            "a claim of length": self.claim,
            "bad commands": self.bad_commands,
            "too many frames": self.many_frames,
            "a message without end": self.endless,
        }

    def conversation(self, kind: str) -> Conversation:
        """One of a kind; often with a few bits flipped, or cut."""
        pieces = self.kinds[kind]()
        if kind != "a message without end" and self.rng.random() < 0.3:
            damaged = self.rng.choice((self.rng.randrange(len(pieces)), len(pieces) - 1))
            raw = bytearray(pieces[damaged])
            for _ in range(self.rng.choice((1, 1, 4, 30)) if raw else 0):
                raw[self.rng.randrange(len(raw))] ^= 1 << self.rng.randrange(8)
            cut = self.rng.randrange(len(raw) + 1)
            # In two parts, or only the first.
            rest = self.rng.choice(([bytes(raw[cut:]), *pieces[damaged + 1 :]], []))
            pieces[damaged:] = [bytes(raw[:cut]), *rest]
        return pieces

    # The kinds

    def noise(self) -> Conversation:
        start = self.rng.choice((b"", b"\xff", b"\xff" + bytes(8) + b"\x7f", b"\xff\0\0\0"))
        return [start + self.bytes(3000) for _ in range(self.rng.randint(1, 3))]

    def another_protocol(self) -> Conversation:
        return [self.rng.choice(_OTHERS), self.bytes(300)]

    def bad_greeting(self) -> Conversation:
        rng = self.rng
        mechanism = rng.choice((b"NULL", b"PLAIN", b"CURVE", b"GSSAPI", b"", b"null", b"\xff" * 20))
        version = bytes([rng.choice((0, 1, 2, 3, 4, 255)), rng.choice((0, 1, 2, 255))])
        whole = greeting(version=version, mechanism=mechanism, as_server=rng.choice((0, 1, 255)))
        return [whole[: rng.choice((64, 64, rng.randrange(64)))], self.bytes(100)]

    def bad_handshake(self) -> Conversation:
        rng = self.rng
        socket_type = rng.choice((b"PUB", b"ROUTER", b"DEALER", b"", b"X" * 300))
        properties = b"".join(
            _property(
                rng.choice((b"Socket-Type", b"Identity", b"", b"N" * 255)),
                rng.choice((socket_type, self.bytes(40), bytes(256))),
                rng.choice((None, None, 0, 2**31, 2**32 - 1)),
            )
            for _ in range(rng.choice((0, 1, 2, 50)))
        )
        name = rng.choice((b"READY", b"READY", b"ERROR", b"HELLO", b"", b"N" * 200))
        whole = command(name, properties)[: rng.choice((None, 3, 9))]
        return [greeting(), rng.choice((whole, ready(socket_type), frame(self.bytes(300))))]

    def bad_curve(self) -> Conversation:
        rng = self.rng
        hello = b"\1\0" + bytes(72) + self.bytes(113, exactly=True) + self.bytes(80, exactly=True)
        initiate = self.bytes(rng.choice((113, 249, 257, 400, 5000)), exactly=True)
        pieces = [
            command(b"HELLO", hello[: rng.choice((194, 194, rng.randrange(300)))]),
            command(b"INITIATE", initiate),
            command(b"MESSAGE", self.bytes(200)),
        ]
        if rng.random() < 0.3:
            rng.shuffle(pieces)
        return [greeting(mechanism=b"CURVE", as_server=rng.choice((0, 0, 1))), *pieces]

    def bad_frames(self) -> Conversation:
        frames = [
            frame(
                self.bytes(self.rng.choice((1, 60, 5000))),
                flags=self.rng.choice((0, MORE, LONG, MORE | LONG, 8, 0x80, 0xF8, 0xFF)),
            )
            for _ in range(self.rng.randint(1, 8))
        ]
        return [greeting(), ready(), *frames]

    def claim(self) -> Conversation:
        flags = self.rng.choice((0, MORE, LONG, COMMAND, MORE | COMMAND))
        claim = frame(self.bytes(2000), flags=flags, length=self.rng.choice(_LENGTHS))
        where = self.rng.choice((0, 1, 2, 2, 2))  # also before the handshake
        return [*[greeting(), ready()][:where], claim]

    def bad_commands(self) -> Conversation:
        rng = self.rng
        commands = [
            command(
                rng.choice((b"PING", b"PONG", b"ERROR", b"SUBSCRIBE", b"CANCEL", b"READY", b"X")),
                rng.choice((b"", b"\0\0", b"\0\1", b"\xff\xff" + bytes(100), self.bytes(500))),
            )
            for _ in range(rng.choice((1, 3, 200)))
        ]
        return [greeting(), ready(), *commands]

    def many_frames(self) -> Conversation:
        number = self.rng.choice((6, 7, 100, 1000, 10_000))
        return [greeting(), ready(), message([self.bytes(20)] * number)]

    def endless(self) -> Conversation:
        body = frame(self.bytes(2 ** self.rng.randint(0, 18), exactly=True), flags=MORE)
        number = min(ENDLESS_BYTES // len(body), 20_000)
        return [greeting(), ready(), body * number]

    def bytes(self, length: int, *, exactly: bool = False) -> bytes:
        return self.rng.randbytes(length if exactly else self.rng.randrange(length + 1))
