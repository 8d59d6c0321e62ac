"""Throw malformed messages at the parser: it must refuse each, or read a message that is one.

    python scripts/fuzz_messages.py [--frames 1000000] [--seed N] [--seconds S]

It ends when so many damaged messages were refused; what the damage left valid comes on top.

If anything but `MalformedMessage` is raised, if a message does not fit the frames that it was read
from, or if reading takes more memory than a multiple of the frames, they are saved in hex, one a
line, and the exit code is 1:

    parse([bytes.fromhex(line) for line in open("fuzz_messages.hex")])
"""

import random
import re
import resource
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from math import inf, isnan
from pathlib import Path

from damaged_messages import NUM_BYTES, DamagedMessages, Frames
from jsonargparse import CLI
from tqdm import tqdm

from moe_lightning.transport.messages import (
    Compute,
    Control,
    MalformedMessage,
    Message,
    Reply,
    Sums,
    WireDtype,
    parse,
)

MAX_RSS_GROWTH_MB = 256  # a body of 2**20 values is read, and takes some 80
MAX_MEMORY = (2**15, 100)  # bytes whatever the message, and bytes for each of its own
MEASURED = 50  # the memory of one in so many is measured: tracing costs more than reading


class ParserError(Exception):
    """The parser did what it must not do."""


def check_consistent(message: Message, frames: Frames) -> None:
    """That what was read is what the frames say, counted without the parser's help."""
    written = [bytes(frame) for frame in message.frames()]
    if isinstance(message, Compute):
        num_choices = message.num_rows * message.num_choices
        _same("index", message.index.nbytes, num_choices * 2)
        _same("weights", message.weights.nbytes, num_choices * NUM_BYTES[message.weights_dtype])
        _check_rows(message, message.rows_dtype)
    elif isinstance(message, Sums):
        _check_rows(message, message.sums_dtype)
        if isnan(message.error):  # which of the NaNs it was is lost
            written[0] = written[0][:40] + frames[0][40:44] + written[0][44:]
    elif isinstance(message, Control | Reply):
        _same("the body, written and read again", parse(written), message)
        written[1:] = frames[1:]
    _same("frames, written again", written, frames)


def _check_rows(message: Compute | Sums, dtype: WireDtype) -> None:
    num_numbers = message.num_rows * message.width
    _same("rows", message.rows.nbytes, num_numbers * NUM_BYTES[dtype])
    _same("scales", message.scales.nbytes, message.num_rows * 4 if dtype == 4 else 0)


def _same(name: str, found: object, expected: object) -> None:
    if found != expected:
        raise ParserError(f"{name}: {found!r:.200} instead of {expected!r:.200}")


class Referee:
    """Looks at what the parser does with frames, and counts it.

    Args:
        parser: The parser.
    """

    def __init__(self, parser: Callable[[Frames], Message]) -> None:
        self.parser = parser
        self.refused: Counter[str] = Counter()
        self.valid: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.most_bytes = 0
        self.start_rss_mb = peak_rss_mb()

    def throw(self, frames: Frames, *, measure_memory: bool) -> bool:
        """Whether the frames were refused.

        Raises:
            ParserError: If the parser did anything wrong.
        """
        if measure_memory:
            tracemalloc.start()
        start_s = time.perf_counter()
        try:
            message = self.parser(frames)
        except MalformedMessage as error:
            # One line for all messages of a kind, whatever their numbers.
            self.refused[re.sub(r"0x[0-9a-f]+|\d+", "N", str(error))] += 1
            message = None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise ParserError(f"raised {type(error).__name__}: {error!s:.200}") from error
        finally:
            self.slowest_s = max(self.slowest_s, time.perf_counter() - start_s)
            if measure_memory:
                num_bytes = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
        if measure_memory:
            self.most_bytes = max(self.most_bytes, num_bytes)
            limit_bytes = MAX_MEMORY[0] + MAX_MEMORY[1] * sum(map(len, frames))
            if num_bytes > limit_bytes:
                raise ParserError(f"reading took {num_bytes:,} bytes of memory, of {limit_bytes:,}")
        if peak_rss_mb() > self.start_rss_mb + MAX_RSS_GROWTH_MB:
            raise ParserError(f"the process has grown by more than {MAX_RSS_GROWTH_MB} MB")
        if message is None:
            return True
        check_consistent(message, frames)
        self.valid[type(message).__name__] += 1
        return False

    def report(self) -> str:
        """All counts."""
        lines = [f"{count:>11,}  refused: {reason}" for reason, count in self.refused.most_common()]
        lines += [f"{count:>11,}  valid: {kind}" for kind, count in self.valid.most_common()]
        growth_mb = peak_rss_mb() - self.start_rss_mb
        lines += [
            f"{self.refused.total():>11,}  refused in all, {self.valid.total():,} valid",
            f"slowest {1e3 * self.slowest_s:.1f} ms; most memory for one "
            f"{self.most_bytes / 1e3:,.0f} kB (one in {MEASURED} measured); "
            f"the process grew by {growth_mb:.0f} MB to {peak_rss_mb():.0f} MB",
        ]
        return "\n".join(lines)


def peak_rss_mb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(
    *,
    frames: int,
    seed: int,
    seconds: float = inf,
    save_as: Path,
    parser: Callable[[Frames], Message] = parse,
) -> int:
    """Throw messages until so many were refused; print what happened.

    Args:
        frames: How many.
        seed: Of the damage.
        seconds: When to stop in any case.
        save_as: Where the frames go that the parser did wrong with.
        parser: The parser.

    Returns:
        The exit code.
    """
    print(f"seed {seed}", flush=True)
    damaged, referee = DamagedMessages(seed), Referee(parser)
    start_s, number = time.perf_counter(), 0
    with tqdm(total=frames, unit=" frames", unit_scale=True, mininterval=1.0) as bar:
        while bar.n < frames and time.perf_counter() - start_s < seconds:
            thrown = damaged.frames()
            number += 1
            try:
                bar.update(referee.throw(thrown, measure_memory=number % MEASURED == 0))
            except ParserError as error:
                save_as.write_text("".join(f"{frame.hex()}\n" for frame in thrown))
                print(f"message {number:,} of seed {seed}: {error}\nsaved as {save_as}")
                return 1
    spent_s = time.perf_counter() - start_s
    print(referee.report())
    print(f"{number:,} messages in {spent_s:.1f} s: {number / spent_s:,.0f}/s; seed {seed}")
    return 0


def main(
    frames: int = 1_000_000,
    seed: int | None = None,
    seconds: float | None = None,
    save_as: Path = Path("fuzz_messages.hex"),
) -> None:
    """Throw malformed messages at the parser.

    Args:
        frames: How many malformed messages; valid ones are not counted.
        seed: Seed of the damage; the default is another one each time.
        seconds: When to stop in any case; the default is never.
        save_as: Where the frames go that the parser did wrong with.
    """
    seed = random.randrange(2**32) if seed is None else seed
    seconds = inf if seconds is None else seconds
    sys.exit(fuzz(frames=frames, seed=seed, seconds=seconds, save_as=save_as))


if __name__ == "__main__":
    CLI(main, as_positional=False)
