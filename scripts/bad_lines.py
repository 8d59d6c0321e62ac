"""Inputs with lines that are bad in every way we know of, and whether predict does as it should.

    python scripts/bad_lines.py --lines 100000

writes three files of so many lines, of which 1, 10 and 50 % are bad, runs ``predict`` with Score on
each (a tiny random checkpoint, whose tokenizer knows a word more than the model does), and holds
``predictions.jsonl``, ``errors.jsonl``, ``run.json`` and ``_SUCCESS`` against what was written:

    line   what               predictions.jsonl         errors.jsonl
    1      good               its answer, in order      -
    2      cut short          -                         id null, line 2, offset 41, stage read
    3      blank              -                         -                        (no row at all)

Byte offsets are found in the file, not taken from who wrote it. Good lines are of many kinds too:
CRLF, a BOM at the start, ids of any script, none, or a number whose digits are another row's text.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import CLI

from moe_lightning.data.lines import MAX_LINE_BYTES
from moe_lightning.demo.random_checkpoint import make_checkpoint

Id = str | int | None
Stage = Literal["read", "encode", "compute"]
# A raw zero byte before this makes the whole file a binary one, which predict refuses.
HEAD_BYTES = 8192
UNKNOWN_WORD = "<unknown-to-the-model>"
RAISES, NOT_FINITE = "raise-", "nan-"  # how the ids begin of rows that a test makes fail
WORDS = ["so", "long", "as", "men", "can", "breathe", "or", "eyes", "see", "this", "gives", "life"]
POSITIONS = 128


@dataclass(frozen=True, slots=True)
class Line:
    """What is expected of a line.

    Attributes:
        kind: What it is.
        start: Its first bytes in the file.
        id: Of the row, or of its error.
        stage: Where it fails; None for good rows.
        reason: What the error says, among other things.
        is_row: Whether it is a row at all.
    """

    kind: str
    start: bytes
    id: Id = None
    stage: Stage | None = None
    reason: str = ""
    is_row: bool = True


class _Lines:
    """Makes lines, one after another."""

    def __init__(
        self, seed: int, *, max_positions: int, long_line_bytes: int, num_long_lines: int
    ) -> None:
        self.draw = random.Random(seed)
        self.max_positions = max_positions
        self.long_line_bytes = long_line_bytes
        self.num_long_lines = num_long_lines
        self.firsts: list[tuple[str | int, int]] = []  # ids of good rows, and their lines
        self.numbers: list[int] = []  # ids whose digits nobody has as text yet
        self.refused: list[str] = []  # ids of rows that never were records

    def words(self, low: int = 2, high: int = 10) -> str:
        return " ".join(self.draw.choices(WORDS, k=self.draw.randint(low, high)))

    def good(self, line: int) -> tuple[str, bytes, Id]:
        """Kind, bytes and id."""
        kinds = ["text", "number", "digits", "none", "null", "unicode", "of a refused row"]
        kind, row = self.draw.choices(kinds, weights=[9, 4, 2, 1, 1, 2, 1])[0], {}
        id: Id = f"row-{line}"
        if kind == "number":
            id = 10**9 + line
            self.numbers.append(id)
        elif kind == "digits" and self.numbers:
            id = str(self.numbers.pop())
        elif kind in ("none", "null"):
            id = line
        elif kind == "unicode":
            id = f"é\u2028\x85\n\t\0🙂-{line}"
        elif kind == "of a refused row" and self.refused:
            id = self.refused.pop()
        if kind == "null":
            row["id"] = None
        elif kind != "none":
            row["id"] = id
            self.firsts.append((id, line))
        if self.draw.random() < 0.15:
            row["messages"] = [{"role": "user", "content": self.words()}]
        else:
            row["prompt"] = self.words() + self.draw.choice(["", "", " é\u2028\0🙂", "\n"])
        if self.draw.random() < 0.1:
            row |= {"temperature": 0, "top_p": 1, "max_new_tokens": 3, "seed": 5, "stop": ["x"]}
        if self.draw.random() < 0.1:
            row["other"] = [{"a": None}]
        raw = json.dumps(row, ensure_ascii=self.draw.random() < 0.5).encode()
        return f"good, id {kind}", raw + self.draw.choice([b"", b"", b"  "]), id

    def bad(self, kind: str, line: int) -> tuple[bytes, Id, Stage, str]:
        """Bytes, id, stage and a part of the reason."""
        raw, id, stage, reason = BAD[kind](self, f"bad-{line}")
        if stage == "read" and isinstance(id, str) and id == f"bad-{line}":
            self.refused.append(id)
        # Without an id of its own a row goes by its line.
        return raw, line if id == _NO_ID else id, stage, reason


Bad = Callable[[_Lines, str], tuple[bytes, Id, Stage, str]]
_NO_ID = "no id"


def _row(id: Any, **fields: Any) -> bytes:
    return json.dumps({"id": id, **fields}).encode()


def _unreadable(raw: bytes, reason: str) -> Bad:
    return lambda lines, id: (raw, None, "read", reason)


def _refused(reason: str, **fields: Any) -> Bad:
    return lambda lines, id: (_row(id, **fields), id, "read", reason)


def _bad_id(value: object, reason: str) -> Bad:
    return lambda lines, id: (_row(value, prompt="a"), None, "read", reason)


def _inside(middle: bytes, reason: str) -> Bad:
    """Bytes that are no text, in the middle of a prompt; the id can't be read either."""
    return lambda lines, id: (
        b'{"id": "%s", "prompt": "so %s long"}' % (id.encode(), middle),
        None,
        "read",
        reason,
    )


def _cut(lines: _Lines, id: str) -> tuple[bytes, Id, Stage, str]:
    whole = _row(id, prompt=lines.words(4))
    return whole[: lines.draw.randrange(1, len(whole))], None, "read", "not JSON"


def _duplicate(lines: _Lines, id: str) -> tuple[bytes, Id, Stage, str]:
    again, first = lines.draw.choice(lines.firsts)
    reason = f"is that of line {first} already"
    return _row(again, prompt=lines.words()), again, "read", reason


def _too_long(lines: _Lines, id: str) -> tuple[bytes, Id, Stage, str]:
    text = " ".join(["so"] * (lines.max_positions + 1))
    return _row(id, prompt=text), id, "encode", f"the model has {lines.max_positions:,} positions"


def _long_line(lines: _Lines, id: str) -> tuple[bytes, Id, Stage, str]:
    raw = _row(id, prompt="x" * lines.long_line_bytes)
    return raw, None, "read", f"at most {lines.long_line_bytes:,} are read"


BAD: dict[str, Bad] = {
    "cut short": _cut,
    "extra comma": lambda lines, id: (_row(id, prompt="a")[:-1] + b",}", None, "read", "not JSON"),
    "bare word": _unreadable(b"hello", "not JSON"),
    "single quotes": _unreadable(b"{'prompt': 'a'}", "not JSON"),
    "two objects": _unreadable(b'{"prompt": "a"} {"prompt": "b"}', "not JSON: Extra data"),
    "a BOM between": _unreadable(b'\xef\xbb\xbf{"prompt": "a"}', "BOM"),
    "zero byte": _inside(b"\0", "not JSON"),
    "tab in a text": _inside(b"\t", "not JSON: Invalid control character"),
    "array": _unreadable(b'[{"prompt": "a"}]', "not a list"),
    "number": _unreadable(b"12", "not a number"),
    "text": _unreadable(b'"a"', "not a string"),
    "null": _unreadable(b"null", "not null"),
    "true": _unreadable(b"true", "not a boolean"),
    "deep": _unreadable(b"[" * 3000 + b"]" * 3000, "nested too deeply"),
    "many digits": _unreadable(b'{"id": ' + b"7" * 5000 + b', "prompt": "a"}', "not usable"),
    "latin-1": _inside("é".encode("latin-1"), "not UTF-8: byte 0xe9"),
    "lone continuation": _inside(b"\x80", "not UTF-8: byte 0x80"),
    "overlong": _inside(b"\xc0\xaf", "not UTF-8: byte 0xc0"),
    "raw surrogate": _inside(b"\xed\xa0\x80", "not UTF-8: byte 0xed"),
    "half a surrogate": _refused("half of a surrogate pair", prompt="a \ud83d b"),
    "other half": _refused("half of a surrogate pair", prompt="\ude00"),
    "half in messages": _refused(
        "half of a surrogate pair", messages=[{"role": "user", "content": "\ud83d"}]
    ),
    "half in the id": _bad_id("a\udfff", "'id' holds half of a surrogate pair"),
    "no prompt": _refused("neither 'prompt' nor 'messages'", text="a"),
    "nothing": lambda lines, id: (b"{}", _NO_ID, "read", "no fields"),
    "no prompt, no id": lambda lines, id: (b'{"q": 1}', _NO_ID, "read", "neither 'prompt'"),
    "prompt is null": _refused("neither 'prompt' nor 'messages'", prompt=None),
    "both": _refused("both", prompt="a", messages=[{"role": "user", "content": "a"}]),
    "prompt is a number": _refused("'prompt' must be a string, not a number", prompt=7),
    "prompt is a list": _refused("'prompt' must be a string, not a list", prompt=["a"]),
    "prompt is NaN": _refused("'prompt' must be a string", prompt=float("nan")),
    "messages are a text": _refused("'messages' must be a list", messages="a"),
    "no messages": _refused("an empty list", messages=[]),
    "no role": _refused("messages[0].role", messages=[{"content": "a"}]),
    "an image": _refused(
        "the model reads text",
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    ),
    "temperature -1": _refused("'temperature' must be", prompt="a", temperature=-1),
    "temperature NaN": _refused("'temperature' must be", prompt="a", temperature=float("nan")),
    "temperature true": _refused("'temperature' must be", prompt="a", temperature=True),
    "top_p 2": _refused("'top_p' must be", prompt="a", top_p=2),
    "max_new_tokens 0": _refused("'max_new_tokens' must be", prompt="a", max_new_tokens=0),
    "max_new_tokens 1.5": _refused("'max_new_tokens' must be", prompt="a", max_new_tokens=1.5),
    "max_tokens": _refused("call it 'max_new_tokens'", prompt="a", max_tokens=5),
    "seed of 65 bits": _refused("'seed' must be", prompt="a", seed=2**64),
    "empty stop": _refused("'stop' must be", prompt="a", stop=[""]),
    "duplicate": _duplicate,
    "id is a list": _bad_id([1], "'id' must be a string or a whole number, not a list"),
    "id is an object": _bad_id({"a": 1}, "not an object"),
    "id is 1.5": _bad_id(1.5, "'id' must be a string or a whole number"),
    "id is true": _bad_id(True, "not a boolean"),
    "empty prompt": lambda lines, id: (_row(id, prompt=""), id, "encode", "no tokens"),
    "too long": _too_long,
    "unknown word": lambda lines, id: (
        _row(id, prompt=f"so {UNKNOWN_WORD}"),
        id,
        "encode",
        "tokenizer and checkpoint do not belong together",
    ),
    "long line": _long_line,
}
COMPUTE: dict[str, tuple[str, str]] = {
    "the model raises": (RAISES, "the model raised RuntimeError: no such luck"),
    "the model gives NaN": (NOT_FINITE, "the model gave NaN or infinite"),
}


def write_bad_lines(
    path: Path,
    num_lines: int,
    share_bad: float,
    seed: int,
    *,
    max_positions: int = POSITIONS,
    long_line_bytes: int = MAX_LINE_BYTES,
    num_long_lines: int = 1,
    num_compute_faults: int = 0,
) -> dict[int, Line]:
    """Write a file of JSON Lines, some of which are bad.

    The first line is good, since some first lines make predict refuse the whole file; the last one
    is cut short, as by a program that was killed (if any are bad).

    Args:
        path: The file.
        num_lines: Lines, of which some 3 % are blank and no rows.
        share_bad: Share of all lines that are bad.
        seed: Same seed, same file.
        max_positions: Of the model.
        long_line_bytes: How long a line may be.
        num_long_lines: How many bad lines are longer, at most; each costs that much disk.
        num_compute_faults: Of the bad lines, so many are good as far as one can see; their ids
            begin with ``RAISES`` or ``NOT_FINITE``, and the test makes the model fail for them.

    Returns:
        For each line, from 1, what is expected of it.
    """
    lines = _Lines(
        seed,
        max_positions=max_positions,
        long_line_bytes=long_line_bytes,
        num_long_lines=num_long_lines,
    )
    draw, expected = lines.draw, {}
    bad = set(draw.sample(range(2, num_lines), max(0, round(share_bad * num_lines) - 1)))
    faults = set(draw.sample(sorted(bad), num_compute_faults))
    others = [kind for kind in BAD if kind != "long line"]
    queue: list[str] = ["long line"] * num_long_lines
    with path.open("wb") as file:
        file.write(b"\xef\xbb\xbf")
        for number in range(1, num_lines + 1):
            start = file.tell() if number > 1 else 0
            is_last = number == num_lines and share_bad > 0
            if is_last or number in bad - faults:
                if not queue:  # every kind before any comes again
                    queue = draw.sample(others, len(others))
                kind = "cut short" if is_last else queue.pop(0)
                if kind == "zero byte" and start < HEAD_BYTES:
                    kind = "tab in a text"
                raw, id, stage, reason = lines.bad(kind, number)
                line = Line(kind, raw[:40], id, stage, reason)
            elif number in faults:
                kind = draw.choice(sorted(COMPUTE))
                prefix, reason = COMPUTE[kind]
                raw = _row(f"{prefix}{number}", prompt=lines.words())
                line = Line(kind, raw[:40], f"{prefix}{number}", "compute", reason)
            elif number > 1 and draw.random() < 0.03:
                raw = draw.choice([b"", b"", b"  \t ", b"\r"])
                line = Line("blank", raw[:40], is_row=False)
            else:
                kind, raw, id = lines.good(number)
                line = Line(kind, raw[:40], id)
            expected[number] = line
            file.write(raw + (b"" if is_last else draw.choice([b"\n"] * 9 + [b"\r\n"])))
    return expected


def check(input: Path, output_dir: Path, expected: dict[int, Line], code: int) -> list[str]:
    """Hold what predict left behind against what was written.

    Args:
        input: The file.
        output_dir: Where the outputs are.
        expected: What `write_bad_lines` returned.
        code: The exit code.

    Returns:
        What is wrong; none if all is well.
    """
    good = [line for line in expected.values() if line.is_row and line.stage is None]
    bad = {number: line for number, line in expected.items() if line.stage is not None}
    wrong = [] if code == (3 if bad else 0) else [f"exit code {code}"]
    ids = [row["id"] for row in _read(output_dir / "predictions.jsonl")]
    wanted = [line.id for line in good]
    if [*map(repr, ids)] != [*map(repr, wanted)]:  # 1 and True, 1 and "1" differ
        pairs = enumerate(zip(ids, wanted, strict=False))
        where = next((n for n, (i, w) in pairs if repr(i) != repr(w)), min(len(ids), len(wanted)))
        wrong.append(f"{len(ids)} answers, not {len(wanted)}, and other ones from number {where}")
    errors = _read(output_dir / "errors.jsonl") if bad else []
    if [error["line"] for error in errors] != list(bad):
        lost = sorted(bad.keys() ^ {error["line"] for error in errors})[:5]
        wrong.append(f"{len(errors)} errors, not {len(bad)}; lines {lost}")
    with input.open("rb") as file:
        offsets = _offsets(input)
        for error in errors:
            number = error["line"]
            if number in bad:
                file.seek(error["offset"])
                start = file.read(43).removeprefix(b"\xef\xbb\xbf" if number == 1 else b"")
                wrong += _check_error(error, bad[number], offsets[number - 1], start)
    counts = {
        "num_rows": len(good) + len(bad),
        "num_predictions": len(good),
        "num_errors": len(bad),
    }
    report = json.loads((output_dir / "run.json").read_text())
    success = json.loads((output_dir / "_SUCCESS").read_text())["counts"]
    for name, found in (("run.json", report), ("_SUCCESS", success)):
        told = {key: found[key] for key in counts}
        if told != counts:
            wrong.append(f"{name} says {told}, not {counts}")
    if len(ids) + len(errors) != counts["num_rows"]:
        wrong.append(f"{counts['num_rows']} rows in, {len(ids)} + {len(errors)} out")
    return wrong


def _check_error(error: dict[str, Any], line: Line, offset: int, start: bytes) -> list[str]:
    where = f"line {error['line']} ({line.kind})"
    wrong = []
    if list(error) != ["id", "line", "offset", "stage", "error"]:
        wrong.append(f"{where}: has {list(error)}")
    if repr(error["id"]) != repr(line.id):
        wrong.append(f"{where}: id {error['id']!r}, not {line.id!r}")
    if error["offset"] != offset or not start.startswith(line.start):
        wrong.append(f"{where}: offset {error['offset']}, not {offset}: {start!r}")
    if error["stage"] != line.stage:
        wrong.append(f"{where}: stage {error['stage']}, not {line.stage}")
    if line.reason not in error["error"]:
        wrong.append(f"{where}: {error['error']!r} does not say {line.reason!r}")
    return wrong


def _offsets(path: Path) -> list[int]:
    offsets, position = [0], 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            start = 0
            while (found := piece.find(b"\n", start)) >= 0:
                start = found + 1
                offsets.append(position + start)
            position += len(piece)
    return offsets


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as file:
        return [json.loads(line) for line in file]


def make_bad_checkpoint(directory: Path, checkpoint: Path | None = None) -> Path:
    """A tiny checkpoint whose tokenizer knows ``UNKNOWN_WORD``, which the model does not.

    Args:
        directory: Where to make it.
        checkpoint: The checkpoint to take; a random one by default.

    Returns:
        Its directory.
    """
    from transformers import AutoTokenizer

    if checkpoint is None:
        shape = {"hidden_size": 32, "num_layers": 2, "num_experts": 4, "top_k": 2}
        heads = {"expert_size": 16, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 512}
        checkpoint = make_checkpoint(
            directory / "tiny", family="qwen3_moe", max_positions=POSITIONS, **shape, **heads
        )
    bad = directory / "with-an-unknown-word"
    shutil.copytree(checkpoint, bad)
    tokenizer = AutoTokenizer.from_pretrained(str(bad))
    tokenizer.add_tokens([UNKNOWN_WORD])
    tokenizer.save_pretrained(str(bad))
    return bad


def main(
    lines: int = 100_000,
    shares: list[float] | None = None,
    seed: int = 0,
    directory: Path | None = None,
) -> int:
    """Run predict on bad lines and print a table.

    Args:
        lines: Lines of each file.
        shares: Shares of bad lines; 0.01, 0.1 and 0.5 by default.
        seed: Seed of the files.
        directory: Where to keep files and outputs; a temporary one by default.

    Returns:
        0 if all is as it should be, otherwise 1.
    """
    print(f"seed {seed}\n")
    print("| lines | bad | predictions | errors | seconds | of CPU | exit code | verdict |")
    print("|---:|---:|---:|---:|---:|---:|---:|---|", flush=True)
    is_well = True
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        place = Path(temporary)
        checkpoint = make_bad_checkpoint(place)
        for share in shares or [0.01, 0.1, 0.5]:
            input, output_dir = place / f"{share}.jsonl", place / f"{share}"
            expected = write_bad_lines(input, lines, share, seed)
            started_s, cpu_s = time.perf_counter(), _children_cpu_s()
            done = _predict(checkpoint, input, output_dir)
            seconds, cpu_s = time.perf_counter() - started_s, _children_cpu_s() - cpu_s
            is_done = (output_dir / "_SUCCESS").exists()
            wrong = check(input, output_dir, expected, done.returncode) if is_done else ["no end"]
            is_well &= not wrong
            names = ("predictions", "errors")
            found = [len(_read(output_dir / f"{n}.jsonl")) if is_done else 0 for n in names]
            num_bad = sum(line.stage is not None for line in expected.values())
            numbers = " | ".join(f"{number:,}" for number in (lines, num_bad, *found))
            verdict = "all as it should be" if not wrong else f"{len(wrong)} wrong: {wrong[:3]}"
            times = f"{seconds:.1f} | {cpu_s:.1f}"
            print(f"| {numbers} | {times} | {done.returncode} | {verdict} |", flush=True)
            if wrong:
                print("\n".join(wrong[:20]), done.stderr[-2000:], file=sys.stderr)
    return int(not is_well)


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _predict(checkpoint: Path, input: Path, output_dir: Path) -> subprocess.CompletedProcess[str]:
    options = {
        "--model.checkpoint": checkpoint,
        "--model.task": "Score",
        "--data.input": input,
        "--output_dir": output_dir,
        "--trainer.enable_progress_bar": "false",
    }
    words = [str(word) for option in options.items() for word in option]
    root = str(Path(__file__).resolve().parents[1])
    return subprocess.run(
        [sys.executable, "-m", "moe_lightning", "predict", *words],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    raise SystemExit(CLI(main))
