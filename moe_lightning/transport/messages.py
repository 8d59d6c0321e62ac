"""The messages between a master and its workers: how each becomes frames and is read back.

    Compute  ─▶ header, rows, scales, index, weights     Control ─▶ header, JSON object
    Sums     ◀─ header, rows, scales                     Reply   ◀─ header, JSON object
    Failure  ◀─ header, text

What a network brings is read here and nowhere else: nothing is unpickled, nothing is allocated
because a header says so, and a message that exists is consistent. Neither this module nor what it
imports knows torch: what the bytes of rows mean there is in `wire`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import Buffer

from moe_lightning.transport.headers import PROTOCOL as PROTOCOL
from moe_lightning.transport.headers import FailureCode as FailureCode
from moe_lightning.transport.headers import Header, pack_header, unpack_header
from moe_lightning.transport.headers import Kind as Kind
from moe_lightning.transport.headers import MalformedMessage as MalformedMessage
from moe_lightning.transport.headers import WireDtype as WireDtype
from moe_lightning.transport.json_objects import MAX_CONTROL_BYTES as MAX_CONTROL_BYTES
from moe_lightning.transport.json_objects import from_json, to_json

MAX_FRAMES = 5
MAX_WIDTH = 2**20
MAX_CHOICES = 4096
MAX_FAILURE_BYTES = 4000

_SCALE_BYTES = 4
_INDEX_BYTES = 2


@dataclass(frozen=True, slots=True)
class Compute:
    """Ask for the weighted sums of experts' outputs, one for each row.

    Args:
        session: The master's session.
        request: The request's id within it.
        layer: The layer in the model.
        num_rows: R; may be 0.
        num_choices: K, choices of each row; 1 to 4096.
        width: D, numbers in a row; 1 to 2**20.
        dtype: In what is computed; not `INT8`.
        rows_dtype: How `rows` is written.
        sums_dtype: How the answer is wanted.
        weights_dtype: How `weights` is written; not `INT8`.
        wants_error: Whether the answer shall say how far `sums_dtype` is from what was computed.
        rows: R × D numbers, raw, in C order, as all of these.
        scales: R × float32 if `rows_dtype` is `INT8`; else empty.
        index: R × K × int16, ids of experts; the layer's number of experts means "not yours".
        weights: R × K numbers.

    Raises:
        MalformedMessage: If sizes or dtypes do not fit together.
    """

    session: int
    request: int
    layer: int
    num_rows: int
    num_choices: int
    width: int
    dtype: WireDtype
    rows_dtype: WireDtype
    sums_dtype: WireDtype
    weights_dtype: WireDtype
    wants_error: bool
    rows: memoryview
    scales: memoryview
    index: memoryview
    weights: memoryview

    def __post_init__(self) -> None:
        if not 1 <= self.num_choices <= MAX_CHOICES:
            raise MalformedMessage(f"{self.num_choices} choices of a row")
        if WireDtype.INT8 in (self.dtype, self.weights_dtype):
            raise MalformedMessage("only rows and sums can be INT8")
        num_choices = self.num_rows * self.num_choices
        _check_rows(self.num_rows, self.width, self.rows_dtype, self.rows, self.scales)
        _check_length("index", self.index, num_choices * _INDEX_BYTES)
        _check_length("weights", self.weights, num_choices * self.weights_dtype.itemsize)

    def frames(self) -> list[Buffer]:
        """The message, with the payload as it is, not copied."""
        header = pack_header(
            *(Kind.COMPUTE, self.session, self.request),
            *(self.layer, self.num_rows, self.width, self.num_choices),
            *(self.dtype, self.rows_dtype, self.sums_dtype, self.weights_dtype),
            self.wants_error,
        )
        return [header, self.rows, self.scales, self.index, self.weights]


@dataclass(frozen=True, slots=True)
class Sums:
    """The answer to `Compute`.

    Args:
        session: The request's session.
        request: The request's id.
        num_rows: R, the request's.
        width: D, the request's.
        sums_dtype: How `rows` is written.
        compute_us: How long the experts took.
        waited_us: How long the request lay at the worker before that, as far as it knows.
        error: Relative error of writing the sums in `sums_dtype`, rounded to float32; NaN if not
            asked for.
        rows: R × D numbers.
        scales: R × float32 if `sums_dtype` is `INT8`; else empty.

    Raises:
        MalformedMessage: If sizes do not fit together.
    """

    session: int
    request: int
    num_rows: int
    width: int
    sums_dtype: WireDtype
    compute_us: int
    waited_us: int
    error: float
    rows: memoryview
    scales: memoryview

    def __post_init__(self) -> None:
        _check_rows(self.num_rows, self.width, self.sums_dtype, self.rows, self.scales)

    def frames(self) -> list[Buffer]:
        """The message, with the payload as it is, not copied."""
        header = pack_header(
            *(Kind.SUMS, self.session, self.request),
            *(self.num_rows, self.width, self.compute_us, self.waited_us),
            *(self.error, self.sums_dtype),
        )
        return [header, self.rows, self.scales]


@dataclass(frozen=True, slots=True)
class Failure:
    """The answer to any request that could not be done.

    Args:
        session: The request's session.
        request: The request's id.
        code: Why.
        text: Why, in words; cut to 4,000 bytes of UTF-8.
    """

    session: int
    request: int
    code: FailureCode
    text: str

    def __post_init__(self) -> None:
        # Lone surrogates (undecodable file names) become "?"; a character cut in two disappears.
        raw = self.text.encode("utf-8", "replace")[:MAX_FAILURE_BYTES]
        object.__setattr__(self, "text", raw.decode("utf-8", "ignore"))

    def frames(self) -> list[Buffer]:
        """The message."""
        header = pack_header(Kind.FAILURE, self.session, self.request, self.code)
        return [header, self.text.encode()]


@dataclass(frozen=True, slots=True)
class Control:
    """Ask for anything but sums.

    Args:
        session: The master's session.
        request: The request's id within it.
        verb: What to do: an ASCII identifier of at most 16 characters.
        body: A JSON object: keys are strings, numbers are finite, at most 16 levels.
    """

    session: int
    request: int
    verb: str
    body: dict[str, Any]

    def __post_init__(self) -> None:
        if not (self.verb.isascii() and self.verb.isidentifier() and len(self.verb) <= 16):
            raise MalformedMessage("the verb is no ASCII identifier of at most 16 characters")

    def frames(self) -> list[Buffer]:
        """The message. `ValueError` if the body is more than 16 MiB of JSON."""
        header = pack_header(Kind.CONTROL, self.session, self.request, self.verb.encode())
        return [header, to_json(self.body)]


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to `Control`.

    Args:
        session: The request's session.
        request: The request's id.
        body: A JSON object, as in `Control`.
    """

    session: int
    request: int
    body: dict[str, Any]

    def frames(self) -> list[Buffer]:
        """The message. `ValueError` if the body is more than 16 MiB of JSON."""
        return [pack_header(Kind.REPLY, self.session, self.request), to_json(self.body)]


Message = Compute | Sums | Failure | Control | Reply


def parse(frames: Sequence[Buffer]) -> Message:
    """Read a message, whoever sent it.

    Args:
        frames: The header and the payload.

    Returns:
        The message; its rows, index and weights are views of the frames.

    Raises:
        MalformedMessage: If the frames are anything but exactly one message. Nothing else is
            raised, whatever the frames hold.
    """
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise MalformedMessage(f"{len(frames)} frames")
    try:
        header, *payload = map(_bytes_of, frames)
        return _read(unpack_header(header), payload)
    # Members that enums do not have, bad UTF-8, bad JSON; JSON nested beyond Python's own limit.
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(str(error)) from None


def _read(header: Header, payload: list[memoryview]) -> Message:
    ids = (header.session, header.request)
    match header.kind, payload:
        case Kind.COMPUTE, [rows, scales, index, weights]:
            layer, num_rows, width, num_choices, *dtypes, flags = header.fields
            if flags > 1:
                raise MalformedMessage(f"flags {flags:#x}")
            dtype, rows_dtype, sums_dtype, weights_dtype = map(WireDtype, dtypes)
            return Compute(
                *(*ids, layer, num_rows, num_choices, width),
                *(dtype, rows_dtype, sums_dtype, weights_dtype, bool(flags)),
                *(rows, scales, index, weights),
            )
        case Kind.SUMS, [rows, scales]:
            num_rows, width, compute_us, waited_us, error, dtype = header.fields
            times = (compute_us, waited_us)
            return Sums(*ids, num_rows, width, WireDtype(dtype), *times, error, rows, scales)
        case Kind.FAILURE, [text]:
            if len(text) > MAX_FAILURE_BYTES:
                raise MalformedMessage(f"a failure's text of {len(text)} bytes")
            return Failure(*ids, FailureCode(*header.fields), str(text, "utf-8"))
        case Kind.CONTROL, [body]:
            (verb,) = header.fields
            return Control(*ids, str(verb.rstrip(b"\0"), "ascii"), from_json(body))
        case Kind.REPLY, [body]:
            return Reply(*ids, from_json(body))
    raise MalformedMessage(f"{header.kind.name} with {len(payload)} frames after the header")


def _bytes_of(frame: Buffer) -> memoryview:
    try:
        view = memoryview(frame)
        return view.cast("B") if view.nbytes else memoryview(b"")  # some empty ones cannot be cast
    except TypeError:
        raise MalformedMessage("a frame that is no contiguous buffer") from None


def _check_rows(
    num_rows: int, width: int, dtype: WireDtype, rows: memoryview, scales: memoryview
) -> None:
    if num_rows < 0 or not 1 <= width <= MAX_WIDTH:
        raise MalformedMessage(f"{num_rows} rows of {width} numbers")
    _check_length("rows", rows, num_rows * width * dtype.itemsize)
    _check_length("scales", scales, num_rows * _SCALE_BYTES if dtype == WireDtype.INT8 else 0)


def _check_length(name: str, frame: memoryview, num_bytes: int) -> None:
    if frame.nbytes != num_bytes:
        raise MalformedMessage(f"{name}: {frame.nbytes} bytes instead of {num_bytes}")
