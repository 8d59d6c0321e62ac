"""Reads the documents of a training file, one at a time: text, prompt and answer, or messages.

A broken line ends the run: training on a file that is not what the user thinks is worse than none.
Nothing is tokenised here.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from moe_lightning.errors import UsageError

TrainingFormat = Literal["auto", "jsonl", "text"]

SEPARATOR = "<|endoftext|>"
MAX_LINE_BYTES = 64 * 2**20
# Longer documents of text files are handed out in parts, cut at line ends.
MAX_PART_CHARS = 2**20
_READ_BYTES = 2**20
_SUFFIXES: dict[str, Literal["jsonl", "text"]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    "": "text",
}
_KINDS = (("text",), ("prompt", "answer"), ("messages",))


@dataclass(frozen=True, slots=True)
class Document:
    """One document, or a part of a long one.

    Args:
        line: The 1-based line of the file on which it starts.
        text: The text to learn; for an answer, the answer.
        prompt: What comes before the answer and is not learnt; None for plain text.
        messages: A conversation of which the assistant's part is learnt; None for text.
        is_start: Whether this is the first part of its document.
        is_end: Whether this is the last part of its document.
    """

    line: int
    text: str = ""
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    is_start: bool = True
    is_end: bool = True


class DocumentFile:
    """A training file as a sequence of documents, read without holding it in memory.

    Args:
        path: The file.
        format: How it is read; `auto` goes by the ending of its name.

    Attributes:
        num_bytes: The size of the file.
        num_bytes_read: How far the iteration is, for a progress bar.

    Raises:
        UsageError: The file is missing, is no text, or its ending says nothing.
    """

    def __init__(self, path: Path, *, format: TrainingFormat = "auto") -> None:
        self.path = path
        self._check_readable()
        self.format = _format_of(path) if format == "auto" else format
        self.num_bytes = path.stat().st_size
        self.num_bytes_read = 0

    def __iter__(self) -> Iterator[Document]:
        """Read the file once.

        Returns:
            An iterator over its documents, empty ones left out.

        Raises:
            UsageError: A line is damaged; the message names the file and the line.
        """
        self.num_bytes_read = 0
        with self.path.open("rb") as file:
            yield from self._read_jsonl(file) if self.format == "jsonl" else self._read_text(file)

    def error(self, line: int, reason: str) -> UsageError:
        """Return an error that names the file and a line of it.

        Args:
            line: The 1-based line.
            reason: What is wrong with it, and what to do.

        Returns:
            The error, to be raised.
        """
        return UsageError(f"{self.path}, line {line}: {reason}")

    def _check_readable(self) -> None:
        if not self.path.exists():
            raise UsageError(f"{self.path} does not exist: give the path of a training file.")
        if not self.path.is_file():
            raise UsageError(f"{self.path} is not a file: give a JSON Lines or text file.")
        try:
            with self.path.open("rb") as file:
                head = file.read(4096)
        except OSError as error:
            raise UsageError(
                f"{self.path} can't be read ({error.strerror}): check its permissions."
            ) from error
        if b"\0" in head or head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"PAR1")):
            raise UsageError(
                f"{self.path} is not a text file (compressed, Parquet or other binary data): "
                "unpack or convert it to JSON Lines or text."
            )

    def _read_jsonl(self, file: BinaryIO) -> Iterator[Document]:
        line = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            line += 1
            self.num_bytes_read += len(raw)
            if len(raw) > MAX_LINE_BYTES:
                raise self.error(line, f"is longer than {MAX_LINE_BYTES >> 20} MiB: split it.")
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise self.error(
                    line, f"is not UTF-8 ({error.reason}): convert the file."
                ) from None
            except (json.JSONDecodeError, RecursionError) as error:
                raise self.error(
                    line,
                    f"is not JSON ({error}): every line is one object such as "
                    '{"text": "..."}; a file that is one JSON array must be split into lines.',
                ) from None
            document = self._parse(row, line)
            if document.text or document.messages:
                yield document

    def _parse(self, row: object, line: int) -> Document:
        if not isinstance(row, dict):
            raise self.error(line, f"is a {type(row).__name__}, not an object: write {{...}}.")
        kinds = [kind for kind in _KINDS if any(key in row for key in kind)]
        if len(kinds) != 1 or any(key not in row for key in kinds[0]):
            raise self.error(
                line,
                f'has the keys {sorted(row)}: give either "text", or "prompt" and "answer", or '
                '"messages".',
            )
        if "messages" in row:
            return Document(line=line, messages=self._parse_messages(row["messages"], line))
        for key in kinds[0]:
            if not isinstance(row[key], str):
                raise self.error(line, f'"{key}" is a {type(row[key]).__name__}, not a string.')
        if "prompt" not in row:
            return Document(line=line, text=row["text"])
        if not row["answer"]:
            raise self.error(line, '"answer" is empty, so there is nothing to learn: remove it.')
        return Document(line=line, text=row["answer"], prompt=row["prompt"])

    def _parse_messages(self, messages: object, line: int) -> list[dict[str, Any]]:
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and isinstance(message.get("role"), str)
            for message in messages
        ):
            raise self.error(
                line, '"messages" is not a list of objects with "role" and "content": write one.'
            )
        if not any(message["role"] == "assistant" for message in messages):
            raise self.error(
                line, "no message has the role assistant, so there is nothing to learn: remove it."
            )
        return messages

    def _read_text(self, file: BinaryIO) -> Iterator[Document]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        lines: list[str] = []
        line, start_line, num_chars, is_start = 1, 1, 0, True
        while True:
            raw = file.readline(_READ_BYTES)
            self.num_bytes_read += len(raw)
            try:
                text = decoder.decode(raw, final=not raw).replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise self.error(
                    line, f"is not UTF-8 ({error.reason}): convert the file."
                ) from None
            if not raw or text.rstrip("\n") == SEPARATOR:
                whole = "".join(lines).strip("\n") if is_start else "".join(lines).rstrip("\n")
                if whole.strip() or not is_start:
                    yield Document(line=start_line, text=whole, is_start=is_start)
                if not raw:
                    return
                lines, num_chars, is_start, start_line = [], 0, True, line + 1
            else:
                lines.append(text)
                num_chars += len(text)
                if num_chars > MAX_PART_CHARS:
                    part = "".join(lines).lstrip("\n") if is_start else "".join(lines)
                    yield Document(line=start_line, text=part, is_start=is_start, is_end=False)
                    lines, num_chars, is_start, start_line = [], 0, False, line + 1
            line += raw.endswith(b"\n")


def _format_of(path: Path) -> Literal["jsonl", "text"]:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UsageError(
            f"{path}: can't tell from '{suffix}' what is in the file. Name it .jsonl or .txt, or "
            "say --data.format jsonl or text."
        )
    return _SUFFIXES[suffix]
