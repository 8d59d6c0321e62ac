"""Opening an input file: which format it has, and what cannot be one at all."""

import os
import shlex
import stat
from pathlib import Path
from typing import Literal

from moe_lightning.data.lines import JsonLinesSource, TextSource
from moe_lightning.data.source import RowSource
from moe_lightning.errors import UsageError

__all__ = ["InputFormat", "RowSource", "open_source"]

InputFormat = Literal["auto", "jsonl", "parquet", "text"]

_FORMATS = ("jsonl", "parquet", "text")
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    "": "text",
}
_HEAD_BYTES = 8192
_UNPACK = "unpack it first"
_MAGICS = (
    (b"\x1f\x8b", "gzip-compressed", _UNPACK),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", _UNPACK),
    (b"\xfd7zXZ\x00", "xz-compressed", _UNPACK),
    (b"BZh91AY&SY", "bzip2-compressed", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"\xff\xfe", "UTF-16 text", "convert it to UTF-8, for example with iconv"),
    (b"\xfe\xff", "UTF-16 text", "convert it to UTF-8, for example with iconv"),
    (b"%PDF-", "a PDF", "extract its text first"),
    (b"ARROW1", "an Arrow (Feather) file", "write it as Parquet or JSON Lines"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a git-LFS pointer instead of the file itself",
        "run `git lfs pull`",
    ),
)
_PARQUET_MAGIC = b"PAR1"


def open_source(path: str | Path, *, format: InputFormat = "auto") -> RowSource:
    """Open an input file.

    Args:
        path: The file.
        format: `jsonl`, `parquet` or `text`; `auto` goes by the file name's ending.

    Returns:
        The source of its rows; nothing but its beginning and end has been read.

    Raises:
        UsageError: If the file cannot be an input at all: missing, unreadable, packed, binary, of
            another format. Single bad rows are `RowError`s of the source instead.
    """
    path = Path(path)
    head, tail = _read_ends(path)
    name = _choose_format(path, format)
    for magic, what, remedy in _MAGICS:
        if head.startswith(magic):
            raise UsageError(f"the input {path} is {what}, not {name}; {remedy}.")
    if name == "parquet":
        return _open_parquet(path, head)
    if head.startswith(_PARQUET_MAGIC):
        raise UsageError(f"the input {path} is a Parquet file; say --data.format parquet.")
    if b"\0" in head:
        raise UsageError(
            f"the input {path} is binary (a zero byte at {head.index(0)}), not {name} in UTF-8; "
            "convert it."
        )
    if name == "text":
        return TextSource(path)
    _check_json_lines(path, head.removeprefix(b"\xef\xbb\xbf").lstrip(), tail.rstrip())
    return JsonLinesSource(path)


def _read_ends(path: Path) -> tuple[bytes, bytes]:
    if not path.name:
        raise UsageError(f"the input {str(path)!r} is no file; name one with --data.input FILE.")
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"the input {path} is a directory; name one file in it.")
        if not stat.S_ISREG(mode):
            raise UsageError(
                f"the input {path} is not a regular file; rows are read twice, so save it to disk "
                "first."
            )
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _HEAD_BYTES))
            return head, file.read(_HEAD_BYTES)
    except FileNotFoundError:
        raise UsageError(
            f"the input {path} does not exist (looked in {Path.cwd()}); check --data.input."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"the input {path} cannot be read: {reason}.") from error


def _choose_format(path: Path, format: InputFormat) -> str:
    if format != "auto":
        if format not in _FORMATS:
            raise UsageError(f"--data.format {format!r} is unknown; use auto, {list(_FORMATS)}.")
        return format
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UsageError(
            f"the input {path} ends in {suffix!r}, which names no known format; convert it to "
            ".jsonl, .parquet or .txt, or say what it holds with --data.format."
        )
    return _SUFFIXES[suffix]


def _open_parquet(path: Path, head: bytes) -> RowSource:
    if not head.startswith(_PARQUET_MAGIC):
        what = "empty (0 bytes)" if not head else "not a Parquet file (it does not begin with PAR1)"
        raise UsageError(
            f"the input {path} is {what}; write it again, or name its format with --data.format."
        )
    from moe_lightning.data.parquet import ParquetSource  # pyarrow is slow to import

    return ParquetSource(path)


def _check_json_lines(path: Path, head: bytes, tail: bytes) -> None:
    """Refuse files of which every line would be a bad row, for one reason."""
    is_json_name = path.suffix.lower() == ".json"
    if head.startswith(b"[") and (is_json_name or tail.endswith(b"]")):
        raise UsageError(
            f"the input {path} is one JSON array; write one object a line instead, for example "
            f"with `jq -c '.[]' {_shell_names(path)}`."
        )
    first_line = head.split(b"\n", 1)[0].rstrip()
    if first_line == b"{" and (is_json_name or tail.rsplit(b"\n", 1)[-1].strip() == b"}"):
        raise UsageError(
            f"the input {path} is JSON spread over several lines; write one object a line instead, "
            f"for example with `jq -c . {_shell_names(path)}`."
        )
    if head[:64].lower().startswith((b"<!doctype html", b"<html")):
        raise UsageError(
            f"the input {path} is an HTML page, not JSON Lines; the download answered with a web "
            "page. Download the file itself."
        )


def _shell_names(path: Path) -> str:
    # Never the input's own name: the shell would empty the file before jq reads it.
    return f"{shlex.quote(str(path))} > {shlex.quote(path.stem + '-rows.jsonl')}"
