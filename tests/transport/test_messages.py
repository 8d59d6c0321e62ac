"""Messages survive the wire exactly, and nothing that is no message gets past `parse`."""

import json
import math
import struct
import subprocess
import sys
import tracemalloc
from array import array
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import Buffer

from moe_lightning.transport import messages
from moe_lightning.transport.messages import (
    MAX_CONTROL_BYTES,
    Compute,
    Control,
    Failure,
    FailureCode,
    MalformedMessage,
    Message,
    Reply,
    Sums,
    WireDtype,
    parse,
)

NUM_BYTES = {
    WireDtype.FLOAT32: 4,
    WireDtype.BFLOAT16: 2,
    WireDtype.FLOAT16: 2,
    WireDtype.INT8: 1,
    WireDtype.FLOAT64: 8,
}
PREFIX = {"magic": (0, "4s"), "protocol": (4, "B"), "kind": (5, "B"), "zero": (6, "H")}


def view(num_bytes: int) -> memoryview:
    """Bytes that tell where they were."""
    return memoryview(bytes(i % 251 for i in range(num_bytes)))


COMPUTE = Compute(
    session=0x1122334455667788,
    request=5,
    layer=7,
    num_rows=3,
    num_choices=2,
    width=4,
    dtype=WireDtype.FLOAT32,
    rows_dtype=WireDtype.INT8,
    sums_dtype=WireDtype.BFLOAT16,
    weights_dtype=WireDtype.FLOAT16,
    wants_error=True,
    rows=view(12),
    scales=view(12),
    index=view(12),
    weights=view(12),
)
SUMS = Sums(
    session=1,
    request=2**64 - 1,
    num_rows=2,
    width=3,
    sums_dtype=WireDtype.FLOAT16,
    compute_us=1000,
    waited_us=2**32 - 1,
    error=0.25,
    rows=view(12),
    scales=view(0),
)
FAILURE = Failure(3, 4, FailureCode.NOT_HELD, "layer 7")
CONTROL = Control(8, 9, "load", {"experts": {"7": [0, 1]}})
REPLY = Reply(8, 9, {"free_bytes": 10})
SAMPLES = [COMPUTE, SUMS, FAILURE, CONTROL, REPLY]

samples = pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)


def as_bytes(frames: Sequence[Buffer]) -> list[bytes]:
    return [bytes(frame) for frame in frames]


def body_frames(body: bytes) -> list[bytes]:
    """A control message with any bytes for a body."""
    return [bytes(CONTROL.frames()[0]), body]


def corrupted(message: Message, offset: int, layout: str, value: Any) -> list[bytes]:
    """The frames, with a field of the header replaced."""
    header, *payload = as_bytes(message.frames())
    raw = bytearray(header)
    struct.pack_into("<" + layout, raw, offset, value)
    return [bytes(raw), *payload]


u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
dtypes = st.sampled_from(WireDtype)
plain_dtypes = st.sampled_from([dtype for dtype in WireDtype if dtype != WireDtype.INT8])
bodies = st.dictionaries(
    st.text(),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    ),
)


@st.composite
def row_fields(draw: st.DrawFn, num_rows: int, width: int, dtype: WireDtype) -> dict[str, Any]:
    rows = draw(st.binary(min_size=8, max_size=8)) * (num_rows * width * NUM_BYTES[dtype])
    num_scales = num_rows if dtype == WireDtype.INT8 else 0
    return {
        "rows": memoryview(rows)[: num_rows * width * NUM_BYTES[dtype]],
        "scales": memoryview(draw(st.binary(min_size=4, max_size=4)) * num_scales),
    }


@st.composite
def computes(draw: st.DrawFn) -> Compute:
    num_rows, num_choices, width = (draw(st.integers(low, 5)) for low in (0, 1, 1))
    rows_dtype, weights_dtype = draw(dtypes), draw(plain_dtypes)
    return Compute(
        *(draw(u64), draw(u64), draw(u32), num_rows, num_choices, width),
        *(draw(plain_dtypes), rows_dtype, draw(dtypes), weights_dtype, draw(st.booleans())),
        **draw(row_fields(num_rows, width, rows_dtype)),
        index=view(2 * num_rows * num_choices),
        weights=view(num_rows * num_choices * NUM_BYTES[weights_dtype]),
    )


@st.composite
def sums(draw: st.DrawFn) -> Sums:
    num_rows, width, dtype = draw(st.integers(0, 5)), draw(st.integers(1, 5)), draw(dtypes)
    return Sums(
        *(draw(u64), draw(u64), num_rows, width, dtype, draw(u32), draw(u32)),
        error=draw(st.floats(width=32, allow_nan=False)),
        **draw(row_fields(num_rows, width, dtype)),
    )


all_messages = st.one_of(
    computes(),
    sums(),
    st.builds(Failure, u64, u64, st.sampled_from(FailureCode), st.text()),
    st.builds(Control, u64, u64, st.from_regex(r"[a-z_][a-z0-9_]{0,15}", fullmatch=True), bodies),
    st.builds(Reply, u64, u64, bodies),
)


# What is written


def test_the_bytes_of_each_message() -> None:
    """By hand: what another program has to write."""
    assert as_bytes(COMPUTE.frames()) == [
        bytes.fromhex("4d6f454c 01 01 0000 8877665544332211 0500000000000000")
        + bytes.fromhex("07000000 03000000 04000000 0200 01 04 02 03 0100"),
        *[bytes(range(12))] * 4,
    ]
    assert as_bytes(SUMS.frames()) == [
        bytes.fromhex("4d6f454c 01 02 0000 0100000000000000 ffffffffffffffff")
        + bytes.fromhex("02000000 03000000 e8030000 ffffffff 0000803e 03000000"),
        bytes(range(12)),
        b"",
    ]
    assert as_bytes(FAILURE.frames()) == [
        bytes.fromhex("4d6f454c 01 03 0000 0300000000000000 0400000000000000 03000000"),
        b"layer 7",
    ]
    assert as_bytes(CONTROL.frames()) == [
        bytes.fromhex("4d6f454c 01 04 0000 0800000000000000 0900000000000000")
        + b"load\0\0\0\0\0\0\0\0\0\0\0\0",
        b'{"experts":{"7":[0,1]}}',
    ]
    assert as_bytes(REPLY.frames()) == [
        bytes.fromhex("4d6f454c 01 05 0000 0800000000000000 0900000000000000"),
        b'{"free_bytes":10}',
    ]


@given(all_messages, st.sampled_from([bytes, bytearray, memoryview]))
def test_round_trips_are_exact(message: Message, kind: Any) -> None:
    frames = message.frames()
    read = parse([kind(frame) for frame in frames])
    assert read == message
    assert as_bytes(read.frames()) == as_bytes(frames)
    assert len(frames) <= messages.MAX_FRAMES


def test_an_error_not_asked_for_stays_nan() -> None:
    read = parse(replace(SUMS, error=math.nan).frames())
    assert isinstance(read, Sums)
    assert math.isnan(read.error)


@pytest.mark.parametrize("message", [COMPUTE, SUMS], ids=["Compute", "Sums"])
def test_reading_copies_no_payload(message: Compute | Sums) -> None:
    frames = [bytearray(frame) for frame in message.frames()]
    read = parse(frames)
    views = [value for f in fields(read) if isinstance(value := getattr(read, f.name), memoryview)]
    assert [v.obj for v in views if v.nbytes] == [f for f in frames[1:] if f]
    frames[1][0] ^= 0xFF
    assert views[0][0] == frames[1][0]


def test_writing_copies_no_payload() -> None:
    payload = COMPUTE.frames()[1:]
    assert [*map(id, payload)] == [
        *map(id, (COMPUTE.rows, COMPUTE.scales, COMPUTE.index, COMPUTE.weights))
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x" * 5000, "x" * 4000),
        ("é" * 2000, "é" * 2000),
        ("x" + "é" * 2000, "x" + "é" * 1999),  # the last would be cut in two
        ("file \udcff", "file ?"),
    ],
)
def test_a_failures_text_is_cut_and_stays_text(text: str, expected: str) -> None:
    failure = Failure(1, 2, FailureCode.LOAD, text)
    assert failure.text == expected
    assert parse(failure.frames()) == failure


def test_lone_surrogates_in_a_body_survive() -> None:
    """Names of files that are no UTF-8 are such strings in Python."""
    control = replace(CONTROL, body={"path": "/data/\udcff"})
    assert parse(control.frames()) == control


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_body_with_no_number_is_not_written(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Reply(1, 2, {"a": [value]}).frames()


def test_a_body_that_nobody_would_read_is_not_written() -> None:
    with pytest.raises(ValueError, match=f"a body of {MAX_CONTROL_BYTES + 8} bytes"):
        Reply(1, 2, {"a": "x" * MAX_CONTROL_BYTES}).frames()


def test_the_largest_body() -> None:
    reply = Reply(1, 2, {"a": "x" * (MAX_CONTROL_BYTES - len('{"a":""}'))})
    assert parse(reply.frames()) == reply


# Messages that do not fit together can't be made, by us or by others


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_rows": 4}, "rows: 12 bytes instead of 16"),
        ({"num_rows": 0}, "rows: 12 bytes instead of 0"),
        ({"num_rows": 2**32 - 1}, "rows: 12 bytes instead of 17179869180"),
        ({"num_rows": -3}, "-3 rows"),
        ({"width": 5}, "rows: 12 bytes instead of 15"),
        ({"width": 0}, "rows of 0 numbers"),
        ({"width": 2**20 + 1}, "rows of 1048577 numbers"),
        ({"num_choices": 3}, "index: 12 bytes instead of 18"),
        ({"num_choices": 0}, "0 choices"),
        ({"num_choices": 4097}, "4097 choices"),
        ({"dtype": WireDtype.INT8}, "only rows and sums can be INT8"),
        ({"weights_dtype": WireDtype.INT8}, "only rows and sums can be INT8"),
        ({"weights_dtype": WireDtype.FLOAT32}, "weights: 12 bytes instead of 24"),
        ({"rows_dtype": WireDtype.FLOAT16}, "rows: 12 bytes instead of 24"),
        ({"rows_dtype": WireDtype.FLOAT16, "rows": view(24)}, "scales: 12 bytes instead of 0"),
        ({"scales": view(0)}, "scales: 0 bytes instead of 12"),
        ({"scales": view(11)}, "scales: 11 bytes instead of 12"),
        ({"index": view(13)}, "index: 13 bytes instead of 12"),
        ({"weights": view(0)}, "weights: 0 bytes instead of 12"),
    ],
)
def test_a_compute_that_does_not_fit_together(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(MalformedMessage, match=reason):
        replace(COMPUTE, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_rows": 3}, "rows: 12 bytes instead of 18"),
        ({"width": 0}, "rows of 0 numbers"),
        ({"width": 2**20 + 1}, "rows of 1048577 numbers"),
        ({"sums_dtype": WireDtype.FLOAT64}, "rows: 12 bytes instead of 48"),
        ({"sums_dtype": WireDtype.INT8, "width": 6}, "scales: 0 bytes instead of 8"),
        ({"scales": view(8)}, "scales: 8 bytes instead of 0"),
    ],
)
def test_sums_that_do_not_fit_together(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(MalformedMessage, match=reason):
        replace(SUMS, **changes)


def test_the_limits_themselves_are_allowed() -> None:
    nothing = dict.fromkeys(("rows", "scales", "index", "weights"), view(0))
    none = replace(COMPUTE, num_rows=0, num_choices=4096, width=2**20, **nothing)
    assert parse(none.frames()) == none
    wide = replace(SUMS, num_rows=1, width=2**20, sums_dtype=WireDtype.FLOAT64, rows=view(2**23))
    assert parse(wide.frames()) == wide


@pytest.mark.parametrize("verb", ["", "a b", "é", "1st", "a" * 17, "load\n", "lo\0ad"])
def test_a_verb_is_a_short_identifier(verb: str) -> None:
    with pytest.raises(MalformedMessage, match="verb"):
        replace(CONTROL, verb=verb)


# What is no message


@samples
@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("magic", b"MoEl", "no message of moe_lightning"),
        ("magic", b"\0\0\0\0", "no message of moe_lightning"),
        ("protocol", 0, "protocol 0; this is protocol 1"),
        ("protocol", 2, "protocol 2; this is protocol 1"),
        ("kind", 0, "0 is not a valid Kind"),
        ("kind", 6, "6 is not a valid Kind"),
        ("kind", 255, "255 is not a valid Kind"),
        ("zero", 1, "reserved"),
        ("zero", 0x8000, "reserved"),
    ],
)
def test_a_wrong_prefix(message: Message, field: str, value: Any, reason: str) -> None:
    with pytest.raises(MalformedMessage, match=reason):
        parse(corrupted(message, *PREFIX[field], value))


@pytest.mark.parametrize(
    ("message", "offset", "layout", "value", "reason"),
    [
        (COMPUTE, 28, "I", 4, "rows: 12 bytes"),
        (COMPUTE, 32, "I", 0, "rows of 0 numbers"),
        (COMPUTE, 36, "H", 0, "0 choices"),
        (COMPUTE, 36, "H", 0xFFFF, "65535 choices"),
        *((COMPUTE, offset, "B", 0, "0 is not a valid WireDtype") for offset in range(38, 42)),
        *((COMPUTE, offset, "B", 6, "6 is not a valid WireDtype") for offset in range(38, 42)),
        (COMPUTE, 38, "B", 4, "only rows and sums"),
        (COMPUTE, 41, "B", 4, "only rows and sums"),
        (COMPUTE, 42, "H", 2, "flags 0x2"),
        (COMPUTE, 42, "H", 0x8001, "flags 0x8001"),
        (SUMS, 24, "I", 1, "rows: 12 bytes instead of 6"),
        (SUMS, 28, "I", 2**20 + 1, "rows of 1048577 numbers"),
        (SUMS, 44, "I", 0, "0 is not a valid WireDtype"),
        (SUMS, 44, "I", 0x103, "259 is not a valid WireDtype"),
        (FAILURE, 24, "I", 0, "0 is not a valid FailureCode"),
        (FAILURE, 24, "I", 8, "8 is not a valid FailureCode"),
        (CONTROL, 24, "16s", b"", "verb"),
        (CONTROL, 24, "16s", b"load\0x", "verb"),
        (CONTROL, 24, "16s", b"\0load", "verb"),
        (CONTROL, 24, "16s", b"lo ad", "verb"),
        (CONTROL, 24, "16s", "é".encode(), "ascii"),
        (CONTROL, 24, "16s", b"\xff" * 16, "ascii"),
    ],
)
def test_a_wrong_field(message: Message, offset: int, layout: str, value: Any, reason: str) -> None:
    with pytest.raises(MalformedMessage, match=reason):
        parse(corrupted(message, offset, layout, value))


@samples
def test_every_value_of_every_byte_of_the_header(message: Message) -> None:
    """Each is refused, or means something else: no byte is ignored."""
    header, *payload = as_bytes(message.frames())
    for offset in range(len(header)):
        for value in set(range(256)) - {header[offset]}:
            raw = header[:offset] + bytes([value]) + header[offset + 1 :]
            try:
                read = parse([raw, *payload])
            except MalformedMessage:
                continue
            assert offset >= 8, "the first eight bytes have one right value, and four kinds"
            assert read != message
            assert as_bytes(read.frames()) == [raw, *payload]


@samples
def test_every_length_of_every_frame(message: Message) -> None:
    frames = as_bytes(message.frames())
    for place, frame in enumerate(frames):
        if message is FAILURE and place == 1:
            continue  # a text of any length is one
        for length in [*range(len(frame)), len(frame) + 1, 2 * len(frame) + 4]:
            other = (frame + b"\1" * length)[:length]
            with pytest.raises(MalformedMessage):
                parse([*frames[:place], other, *frames[place + 1 :]])


def test_a_failures_text_is_short_utf8() -> None:
    header = FAILURE.frames()[0]
    assert parse([header, b""]) == replace(FAILURE, text="")
    assert parse([header, b"x" * 4000]) == replace(FAILURE, text="x" * 4000)
    for text in (b"x" * 4001, b"\xff", "é".encode()[:1], b"\xed\xa0\x80"):
        with pytest.raises(MalformedMessage):
            parse([header, text])


@pytest.mark.parametrize("count", [0, 6, 7, 10_000])
def test_numbers_of_frames_that_no_message_has(count: int) -> None:
    """Refused before anything is looked at."""
    with pytest.raises(MalformedMessage, match=f"^{count} frames$"):
        parse(["no buffer"] * count)  # type: ignore[list-item]


@samples
def test_every_wrong_number_of_frames(message: Message) -> None:
    frames = as_bytes(message.frames())
    wrong = [
        *(frames[:count] for count in range(len(frames))),
        *([*frames, *[b""] * count] for count in range(1, 7)),
        [*frames, *frames],
        frames * 100,
        [b"", *frames],
        [b""],
        [b""] * len(frames),
    ]
    for other in wrong:
        with pytest.raises(MalformedMessage):
            parse(other)


def test_frames_of_one_kind_with_the_header_of_another() -> None:
    one_text = {(Failure, Control), (Failure, Reply), (Control, Reply), (Reply, Control)}
    for one, other in permutations(SAMPLES, 2):
        frames = [one.frames()[0], *other.frames()[1:]]
        if (type(one), type(other)) in one_text:
            assert type(parse(frames)) is type(one)
        else:
            with pytest.raises(MalformedMessage):
                parse(frames)


@pytest.mark.parametrize(
    "frame",
    ["text", None, 3, ["a"], memoryview(bytes(96))[::2]],
    ids=["text", "None", "int", "list", "strided"],
)
def test_a_frame_that_is_no_plain_buffer(frame: Any) -> None:
    with pytest.raises(MalformedMessage, match="buffer"):
        parse([frame, b""])


def test_a_frame_that_was_released() -> None:
    frame = memoryview(b"x")
    frame.release()
    with pytest.raises(MalformedMessage, match="released"):
        parse([frame, b""])


def test_buffers_of_nothing() -> None:
    none = np.empty((0, 4))
    assert parse([FAILURE.frames()[0], none]) == replace(FAILURE, text="")
    with pytest.raises(MalformedMessage, match="a header of 0 bytes"):
        parse([none])


def test_buffers_of_other_items_are_their_bytes() -> None:
    header = COMPUTE.frames()[0]
    three_doubles = array("d", [1.0, 2.0, 3.0])
    read = parse([header, COMPUTE.rows, COMPUTE.scales, COMPUTE.index, array("i", [1, 2, 3])])
    assert isinstance(read, Compute)
    assert bytes(read.weights) == struct.pack("<3i", 1, 2, 3)
    with pytest.raises(MalformedMessage, match="index: 24 bytes"):
        parse([header, COMPUTE.rows, COMPUTE.scales, three_doubles, COMPUTE.weights])


# What claims to be large


def peak_bytes(frames: Sequence[Buffer]) -> int:
    """The most that refusing the frames takes."""
    tracemalloc.start()
    try:
        with pytest.raises(MalformedMessage):
            parse(frames)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("payload", [b"", b"x" * 8])
@pytest.mark.parametrize("num_rows", [2**16, 2**31, 2**32 - 1])
def test_a_claim_costs_nothing(num_rows: int, payload: bytes) -> None:
    compute = bytes(COMPUTE.frames()[0])[:28] + struct.pack(
        "<IIHBBBBH", num_rows, 2**20, 4096, 1, 4, 4, 1, 1
    )
    sums = bytes(SUMS.frames()[0])[:24] + struct.pack("<IIIIfI", num_rows, 2**20, 0, 0, 0.0, 4)
    assert peak_bytes([compute, *[payload] * 4]) < 2**14
    assert peak_bytes([sums, *[payload] * 2]) < 2**14


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":[' + b"[]," * (2**20) + b"0]}",
        b'{"a":[' + b"{}," * (2**20) + b"0]}",
        b'{"a":[' + b"-9," * (2**20) + b"0]}",
        b"{" + b'"a":1,' * (2**20) + b'"a":1}',
        b'{"a":[' + b"[[[[[[[]]]]]]]," * 2**17 + b"0]}",
        b'{"a":[' + b'{"a":{"a":{}}},' * 2**18 + b"0]}",
        b"[" * 2**24,
        b'{"a":' * 2**20,
    ],
    ids=[
        *("lists", "objects", "integers", "doubled keys", "lists in lists", "objects in objects"),
        *("depth of lists", "depth of objects"),
    ],
)
def test_a_body_that_would_grow_is_not_read(body: bytes) -> None:
    """Text alone: 3 MiB of these would be 70 MiB of objects."""
    assert peak_bytes(body_frames(body)) < len(body) + 2**16


def test_a_body_that_is_too_long_is_not_even_decoded() -> None:
    body = bytes(MAX_CONTROL_BYTES + 1)
    assert peak_bytes(body_frames(body)) < 2**14


def test_a_body_of_many_values_within_the_limits() -> None:
    """Every expert of a model far larger than any there is."""
    control = replace(CONTROL, body={str(layer): list(range(4096)) for layer in range(200)})
    assert parse(control.frames()) == control


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"}",
        b"{}{}",
        b"{} x",
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a" 1}',
        b"{1:2}",
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":.5}',
        b'{"a":0x1}',
        b'{"a":tru}',
        b'{"a":"\n"}',
        b'{"a":"\\x"}',
        b'{"a":"\\ud8"}',
        b"\0",
        b"{}\0",
        # text that is no UTF-8
        b'{"a":"\xff"}',
        b'{"a":"\xc3"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\xf8\x88\x80\x80\x80"}',
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        "{}".encode("utf-32-le"),
        # JSON, but no object
        b"[]",
        b"null",
        b"1",
        b'"a"',
        b"true",
        # numbers that are none
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":-1e999}',
        b'{"a":' + b"9" * 33 + b"}",
        b'{"a":-' + b"9" * 32 + b"}",
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":' + b"9" * 10**6 + b"}",
        b'{"a":0.' + b"1" * 10**6 + b"}",
        b'{"a":1e' + b"1" * 10**6 + b"}",
    ],
    ids=lambda body: body[:16].decode("latin-1").encode("unicode_escape").decode(),
)
def test_a_bad_body(body: bytes) -> None:
    with pytest.raises(MalformedMessage) as caught:
        parse(body_frames(body))
    assert len(str(caught.value)) < 120, "the reason does not repeat what was sent"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("depth", [16, 17, 100, 900, 5000, 100_000, 2**20 - 1])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_deep_bodies(opening: bytes, closing: bytes, depth: int) -> None:
    inner = depth - 1
    frames = body_frames(b'{"a":' + opening * inner + b"0" + closing * inner + b"}")
    if depth <= 16:
        assert parse(frames) == Control(8, 9, "load", json.loads(frames[1]))
        return
    with pytest.raises(MalformedMessage):
        parse(frames)
    with pytest.raises(MalformedMessage):  # the same, cut off
        parse([frames[0], frames[1][: len(frames[1]) // 2]])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18446744073709551615", 2**64 - 1),
        ("-9223372036854775808", -(2**63)),
        ("9" * 32, 10**32 - 1),
        ("-2.2250738585072014e-308", -2.2250738585072014e-308),
        ("1.7976931348623157e+308", 1.7976931348623157e308),
        ("1E3", 1000.0),
        ("1e-999", 0.0),
        ("true", True),
        ("null", None),
        (' "\\u00e9" ', "é"),
    ],
)
def test_values_of_a_body(text: str, value: Any) -> None:
    read = parse(body_frames(b'{"a":%b}' % text.encode()))
    assert read == replace(CONTROL, body={"a": value})
    assert type(read.body["a"]) is type(value)


def test_importing_it_imports_nothing_heavy_and_nothing_that_unpickles() -> None:
    """A fuzzer, or a reader of captured traffic, needs no torch; a parser needs no pickle."""
    code = (
        "import sys; import moe_lightning.transport.messages as m;"
        "print(*sorted({'torch', 'numpy', 'pickle', '_pickle', 'zmq'} & {*sys.modules}));"
        "print(m.parse(m.Reply(1, 2, {}).frames()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "\nReply(session=1, request=2, body={})\n", done.stderr
