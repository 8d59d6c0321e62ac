"""Messages of each kind, damaged: what fuzz_messages.py throws.

Bits are flipped, frames cut, swapped and mixed with other messages' frames, fields of the header
and tokens of the JSON replaced by values that are likely to hurt. A few are noise from the start.
"""

import random

from moe_lightning.transport.messages import (
    Compute,
    Control,
    Failure,
    FailureCode,
    Message,
    Reply,
    Sums,
    WireDtype,
)

Frames = list[bytes]
# Apart from the parser's own tables, which may be wrong.
NUM_BYTES = dict(zip(WireDtype, (4, 2, 2, 1, 8), strict=True))
PLAIN = [dtype for dtype in WireDtype if dtype != WireDtype.INT8]
PREFIX = [(0, 4), (4, 1), (5, 1), (6, 2), (8, 8), (16, 8)]  # offset and length of each field
FIELDS = {
    1: [(24, 4), (28, 4), (32, 4), (36, 2), (38, 1), (39, 1), (40, 1), (41, 1), (42, 2)],
    2: [(24, 4), (28, 4), (32, 4), (36, 4), (40, 4), (44, 4)],
    3: [(24, 4)],
    4: [(24, 16)],
}
VALUES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 4095, 4096, 4097, 2**15, 2**16 - 1, 2**20, 2**20 + 1]
VALUES += [2**31 - 1, 2**31, 2**32 - 1, 0x7F800001, 0x7FC00000, 2**63, 2**64 - 1]
TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"0", b"-", b"9", b".", b"e", b"E"]
TOKENS += [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"null", b"true", b'{"a":', b"[[],", b"\0"]
TOKENS += [b"\\u0000", b"\\ud800", b"\\u12", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf"]


class DamagedMessages:
    """An endless source of them; some are still valid.

    Args:
        seed: The same messages for the same seed.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.damages = [
            *[self.flip_bits, self.cut, self.resize, self.splice, self.overwrite],
            *[self.edit_field] * 3,
            *[self.edit_text, self.edit_text, self.new_text],
            *[self.drop, self.double, self.swap, self.exchange, self.new_header],
        ]

    def frames(self) -> Frames:
        """The next one; maybe of no frames at all."""
        if self.random.random() < 0.02:
            return [self.noise(100) for _ in range(self.random.randrange(8))]
        frames = [bytes(frame) for frame in self.message().frames()]
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            if frames:
                self.random.choice(self.damages)(frames)
        return frames

    def message(self) -> Message:
        """A valid one, of any kind."""
        rng = self.random
        ids = (rng.getrandbits(64), rng.getrandbits(64))
        kind = rng.randrange(5)
        if kind == 0:
            num_rows, num_choices, width = rng.randrange(5), rng.randint(1, 4), rng.randint(1, 8)
            rows_dtype, weights_dtype = rng.choice(list(WireDtype)), rng.choice(PLAIN)
            return Compute(
                *(*ids, rng.getrandbits(32), num_rows, num_choices, width),
                *(rng.choice(PLAIN), rows_dtype, rng.choice(list(WireDtype)), weights_dtype),
                rng.random() < 0.5,
                *self.rows(num_rows, width, rows_dtype),
                index=self.bytes(num_rows * num_choices * 2),
                weights=self.bytes(num_rows * num_choices * NUM_BYTES[weights_dtype]),
            )
        if kind == 1:
            num_rows, width, dtype = rng.randrange(5), rng.randint(1, 8), rng.choice([*WireDtype])
            times = (rng.getrandbits(32), rng.getrandbits(32))
            rows = self.rows(num_rows, width, dtype)
            return Sums(*ids, num_rows, width, dtype, *times, rng.random(), *rows)
        if kind == 2:
            return Failure(*ids, rng.choice(list(FailureCode)), "é" * rng.randrange(20))
        body = {"experts": {str(i): [0, -1, 1.5] for i in range(rng.randrange(4))}, "text": "é\n"}
        if kind == 3:
            return Control(*ids, rng.choice(("hello", "load", "join", "bye")), body)
        return Reply(*ids, body)

    def rows(self, num_rows: int, width: int, dtype: WireDtype) -> tuple[memoryview, memoryview]:
        num_scales = num_rows if dtype == WireDtype.INT8 else 0
        return self.bytes(num_rows * width * NUM_BYTES[dtype]), self.bytes(num_scales * 4)

    def bytes(self, length: int) -> memoryview:
        return memoryview(self.random.randbytes(length))

    def noise(self, length: int) -> bytes:
        return self.random.randbytes(self.random.randrange(length))

    def place(self, frames: Frames) -> int:
        """Which frame: often the header."""
        return 0 if self.random.random() < 0.4 else self.random.randrange(len(frames))

    # What can be done to frames, in place

    def flip_bits(self, frames: Frames) -> None:
        i = self.place(frames)
        raw = bytearray(frames[i])
        for _ in range(self.random.choice((1, 1, 2, 8)) if raw else 0):
            raw[self.random.randrange(len(raw))] ^= 1 << self.random.randrange(8)
        frames[i] = bytes(raw)

    def cut(self, frames: Frames) -> None:
        i = self.place(frames)
        frames[i] = frames[i][: self.random.randrange(len(frames[i]) + 1)]

    def resize(self, frames: Frames) -> None:
        i = self.place(frames)
        longest = self.random.choice((8, 64, 1000, 4001, 2**16))
        length = self.random.choice((longest, self.random.randrange(longest)))
        raw = frames[i] or b"x"
        frames[i] = (raw * (length // len(raw) + 1))[:length]

    def splice(self, frames: Frames) -> None:
        """The beginning of one frame, the end of another message's."""
        i = self.place(frames)
        other = bytes(self.random.choice(self.message().frames()))
        frames[i] = (
            frames[i][: self.random.randrange(len(frames[i]) + 1)]
            + other[self.random.randrange(len(other) + 1) :]
        )

    def overwrite(self, frames: Frames) -> None:
        i = self.place(frames)
        start = self.random.randrange(len(frames[i]) + 1)
        new = self.noise(16)
        frames[i] = frames[i][:start] + new + frames[i][start + len(new) :]

    def edit_field(self, frames: Frames) -> None:
        header = frames[0]
        fields = PREFIX + FIELDS.get(header[5] if len(header) > 5 else 0, []) * 3
        offset, length = self.random.choice(fields)
        limit = 2 ** (8 * length)
        value = int.from_bytes(header[offset : offset + length], "little")
        near = (value + self.random.choice((-1, 1))) % limit
        new = self.random.choice((near, self.random.choice(VALUES) % limit))
        frames[0] = header[:offset] + new.to_bytes(length, "little") + header[offset + length :]

    def edit_text(self, frames: Frames) -> None:
        """In the last frame: tokens of JSON in or instead of what is there, also very often."""
        text = frames[-1]
        start = self.random.randrange(len(text) + 1)
        end = min(len(text), start + self.random.choice((0, 0, 1, 4)))
        times = self.random.choice((1, 1, 1, 2, 40, 40, 2000))
        frames[-1] = text[:start] + self.random.choice(TOKENS) * times + text[end:]

    def new_text(self, frames: Frames) -> None:
        """The last frame becomes JSON, nearly: deep, long, or no object."""
        rng = self.random
        opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
        depth = rng.choice((0, 1, 14, 15, 16, 17, 400, 3000))
        times, value = rng.choice((0, 0, 1, 100)), rng.choice((b"-1e5", b'"x"', b"[]", b"{}", b"0"))
        if rng.random() < 0.01:
            times = 2**20
        elif rng.random() < 0.2:
            value = b"9" * rng.randrange(1, 50)
        text = opening * depth + b"[" + (value + b",") * times + value + b"]" + closing * depth
        frames[-1] = rng.choice((b'{"a":' + text + b"}", text))

    def drop(self, frames: Frames) -> None:
        del frames[self.random.randrange(len(frames))]

    def double(self, frames: Frames) -> None:
        new = self.random.choice((b"", self.random.choice(frames), self.noise(50)))
        start = self.random.randrange(len(frames) + 1)
        frames[start:start] = [new] * self.random.choice((1, 1, 2, 100))

    def swap(self, frames: Frames) -> None:
        self.random.shuffle(frames)

    def exchange(self, frames: Frames) -> None:
        """A header, or a payload, of another message."""
        other = [bytes(frame) for frame in self.message().frames()]
        if self.random.random() < 0.5:
            frames[0] = other[0]
        else:
            frames[1:] = other[1:]

    def new_header(self, frames: Frames) -> None:
        """The right beginning, the right length, and noise."""
        kind = self.random.randrange(1, 6)
        length = sum(length for _, length in FIELDS.get(kind, []))
        frames[0] = b"MoEL\1" + bytes([kind, 0, 0]) + self.random.randbytes(16 + length)
