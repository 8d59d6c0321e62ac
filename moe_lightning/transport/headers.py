"""The first frame of every message: what it is, whose it is, and the sizes of what follows.

    offset  0 "MoEL"   4 protocol   5 kind   6 zero   8 session   16 request   24 fields of the kind

All integers are little-endian.
"""

from enum import IntEnum
from struct import Struct
from typing import Any, NamedTuple

PROTOCOL = 1

_MAGIC = b"MoEL"
_PREFIX = Struct("<4sBBHQQ")


class MalformedMessage(ValueError):  # noqa: N818  # it is the message that is malformed
    """Frames that are no message of this protocol. The text says why, in a few words."""


class Kind(IntEnum):
    """What a message is."""

    COMPUTE = 1
    SUMS = 2
    FAILURE = 3
    CONTROL = 4
    REPLY = 5


class WireDtype(IntEnum):
    """How numbers are written; `INT8` rows have one float32 scale each, in a frame of their own."""

    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    INT8 = 4
    FLOAT64 = 5

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return (4, 2, 2, 1, 8)[self - 1]


class FailureCode(IntEnum):
    """Why a request has no other answer."""

    MALFORMED = 1
    WRONG_SESSION = 2
    NOT_HELD = 3
    COMPUTE = 4
    BUSY = 5
    REFUSED = 6
    LOAD = 7


_FIELDS = {
    # layer, rows, width; choices; dtypes: computed in, of rows, of sums, of weights; flags
    Kind.COMPUTE: Struct("<III HBBBBH"),
    # rows, width, compute_us, waited_us; error; dtype
    Kind.SUMS: Struct("<IIII f I"),
    Kind.FAILURE: Struct("<I"),  # code
    Kind.CONTROL: Struct("<16s"),  # verb, filled up with zero bytes
    Kind.REPLY: Struct("<"),
}


class Header(NamedTuple):
    """A header, read."""

    kind: Kind
    session: int
    request: int
    fields: tuple[Any, ...]


def pack_header(kind: Kind, session: int, request: int, *fields: object) -> bytes:
    """Write a header.

    Args:
        kind: What the message is.
        session: The master's session, 64 bits.
        request: The request's id, 64 bits.
        fields: The numbers of its kind, in the order above.

    Returns:
        The frame.
    """
    prefix = _PREFIX.pack(_MAGIC, PROTOCOL, kind, 0, session, request)
    return prefix + _FIELDS[kind].pack(*fields)


def unpack_header(frame: memoryview) -> Header:
    """Read a header.

    Args:
        frame: Its bytes.

    Returns:
        What it says; the values of fields are not looked at.

    Raises:
        MalformedMessage: If it is none of this protocol.
        ValueError: If there is no such kind.
    """
    if len(frame) < _PREFIX.size:
        raise MalformedMessage(f"a header of {len(frame)} bytes")
    magic, protocol, kind, zero, session, request = _PREFIX.unpack_from(frame)
    if magic != _MAGIC:
        raise MalformedMessage("no message of moe_lightning")
    if protocol != PROTOCOL:
        raise MalformedMessage(f"protocol {protocol}; this is protocol {PROTOCOL}")
    if zero != 0:
        raise MalformedMessage("reserved bytes are not zero")
    layout = _FIELDS[Kind(kind)]
    if len(frame) != _PREFIX.size + layout.size:
        raise MalformedMessage(f"a header of {len(frame)} bytes")
    return Header(Kind(kind), session, request, layout.unpack_from(frame, _PREFIX.size))
