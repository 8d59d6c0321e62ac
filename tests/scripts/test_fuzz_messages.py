"""The parser survives a short run of the fuzzer, and the fuzzer finds parsers that are wrong."""

import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from moe_lightning.transport.messages import Compute, Failure, MalformedMessage, Message, parse

ROOT = Path(__file__).resolve().parents[2]
Frames = list[bytes]
KINDS = {"Compute", "Sums", "Failure", "Control", "Reply"}
# One for each check of the parser, in its words.
REASONS = """
    N frames
    a header of N bytes
    no message of moe_lightning
    protocol N; this is protocol N
    reserved bytes are not zero
    N is not a valid Kind
    COMPUTE with N frames after the header
    N is not a valid WireDtype
    flags N
    N choices of a row
    only rows and sums can be INTN
    N rows of N numbers
    rows: N bytes instead of N
    scales: N bytes instead of N
    index: N bytes instead of N
    weights: N bytes instead of N
    SUMS with N frames after the header
    FAILURE with N frames after the header
    N is not a valid FailureCode
    a failure's text of N bytes
    'utf-N' codec can't decode byte N in position N: invalid start byte
    CONTROL with N frames after the header
    'ascii' codec can't decode byte N in position N: ordinal not in range(N)
    the verb is no ASCII identifier of at most N characters
    REPLY with N frames after the header
    a body of too many values
    a body of more than N levels
    the body is no JSON object
    a number of N characters in the body
    a number that no double holds in the body
    NaN in the body
    Expecting value: line N column N (char N)
    Extra data: line N column N (char N)
    """


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts"))
    import fuzz_messages

    yield fuzz_messages
    sys.path.remove(str(ROOT / "scripts"))


def test_the_parser_survives_and_every_check_was_needed(tmp_path: Path) -> None:
    path = tmp_path / "bad.hex"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "fuzz_messages.py"),
            *("--frames", "20000", "--seed", "0", "--save_as", path),
        ],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not path.exists()
    counts = {
        text: int(count.replace(",", ""))
        for count, text in re.findall(r"^ *([\d,]+)  (.+)$", done.stdout, re.MULTILINE)
    }
    expected = {f"refused: {line.strip()}" for line in REASONS.strip().splitlines()}
    assert expected - counts.keys() == set()
    valid = {text: count for text, count in counts.items() if text.startswith("valid: ")}
    assert valid.keys() == {
        f"valid: {m}" for m in ["Compute", "Sums", "Failure", "Control", "Reply"]
    }
    refused = sum(count for text, count in counts.items() if text.startswith("refused: "))
    assert refused == 20_000
    assert counts[f"refused in all, {sum(valid.values()):,} valid"] == refused
    assert "seed 0\n" in done.stdout
    assert re.search(r"; the process grew by \d+ MB to \d+ MB\n", done.stdout)
    assert "100%" in done.stderr


def raises_something_else(frames: Frames) -> Message:
    kind = struct.unpack_from("<4sBB", frames[0] if frames else b"")[2]
    return parse(frames) if kind else parse([])


def recurses(frames: Frames) -> Message:
    if len(frames) == 3:
        raise RecursionError("too deep")
    return parse(frames)


def ignores_further_frames(frames: Frames) -> Message:
    return parse(frames[:2]) if frames and frames[0][5:6] == b"\3" else parse(frames)


def ignores_reserved_bytes(frames: Frames) -> Message:
    return parse([frames[0][:6] + b"\0\0" + frames[0][8:], *frames[1:]] if frames else [])


def believes_in_sizes(frames: Frames) -> Message:
    """As a parser that reads rows without looking how many there are."""
    message = parse(frames)
    if isinstance(message, Compute) and message.num_rows:
        object.__setattr__(message, "num_rows", message.num_rows - 1)
    return message


def allocates_what_is_claimed(frames: Frames) -> Message:
    if frames and len(frames[0]) >= 32:
        bytearray(min(int.from_bytes(frames[0][28:32], "little"), 2**24))
    return parse(frames)


def changes_text(frames: Frames) -> Message:
    message = parse(frames)
    if isinstance(message, Failure):
        return Failure(message.session, message.request, message.code, message.text.strip("é"))
    return message


@pytest.mark.parametrize(
    ("parser", "reason"),
    [
        (raises_something_else, "raised error: unpack_from requires"),
        (recurses, "raised RecursionError: too deep"),
        (ignores_further_frames, "frames, written again: "),
        (ignores_reserved_bytes, "frames, written again: "),
        (believes_in_sizes, "index: "),
        (allocates_what_is_claimed, "bytes of memory"),
        (changes_text, "frames, written again: "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_parsers_are_found(
    parser: object,
    reason: str,
    fuzzer: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.hex"
    assert fuzzer.fuzz(frames=20_000, seed=3, save_as=path, parser=parser) == 1
    printed = capsys.readouterr().out
    assert reason in printed
    assert f"saved as {path}" in printed
    frames = [bytes.fromhex(line) for line in path.read_text().splitlines()]
    referee = fuzzer.Referee(parser)
    with pytest.raises(fuzzer.ParserError, match=re.escape(reason)):
        referee.throw(frames, measure_memory=True)


def test_time_ends_it_too(fuzzer: ModuleType, tmp_path: Path) -> None:
    assert fuzzer.fuzz(frames=10**9, seed=1, seconds=0.2, save_as=tmp_path / "bad.hex") == 0


def test_the_same_seed_throws_the_same(fuzzer: ModuleType) -> None:
    one, same, other = (fuzzer.DamagedMessages(seed) for seed in (7, 7, 8))
    thrown = [one.frames() for _ in range(300)]
    assert thrown == [same.frames() for _ in range(300)]
    assert thrown != [other.frames() for _ in range(300)]


def test_undamaged_messages_are_valid(fuzzer: ModuleType) -> None:
    damaged, referee = fuzzer.DamagedMessages(5), fuzzer.Referee(parse)
    for _ in range(300):
        assert not referee.throw(list(map(bytes, damaged.message().frames())), measure_memory=False)
    assert referee.valid.keys() == KINDS
    with pytest.raises(MalformedMessage):
        parse([])
