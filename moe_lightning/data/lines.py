"""Inputs of one row a line: JSON Lines and plain text, read by byte offset.

line 1   {"id": "a", "prompt": ...}      row 0   offset 0
line 2                                   blank: no row
line 3   {"id": "b", "prompt": ...}      row 1   offset 41, line = row + 2
"""

import json
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from moe_lightning.data.records import Record, RecordError, RowError, RowOptions, parse_record
from moe_lightning.data.source import RowSource
from moe_lightning.errors import UsageError

MAX_LINE_BYTES = 64 * 2**20
_BOM = b"\xef\xbb\xbf"
_SKIP_BYTES = 2**16


class LineSource(RowSource):
    """Rows that are lines. Blank lines are no rows; a UTF-8 BOM and CRLF are accepted.

    Args:
        path: The file.
        max_line_bytes: Longer lines are errors and are not held in memory.
    """

    def __init__(self, path: Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        super().__init__(path)
        self._max_line_bytes = max_line_bytes
        self._offsets = array("q")
        # Where `line - row` grows: it is constant between blank lines.
        self._gap_rows = array("q")
        self._gap_sizes = array("q")

    def _scan_rows(self) -> Iterator[Record | RowError]:
        self._offsets, self._gap_rows, self._gap_sizes = array("q"), array("q"), array("q")
        offset = line = row = gap = 0
        with self._open() as file:
            while True:
                text, num_bytes = self._read_line(file, is_first=offset == 0)
                if num_bytes == 0:
                    return
                line += 1
                if text is None or text.strip():
                    self._offsets.append(offset)
                    if line - row != gap:
                        gap = line - row
                        self._gap_rows.append(row)
                        self._gap_sizes.append(gap)
                    yield self._to_item(text, num_bytes, row=row, line=line, offset=offset)
                    row += 1
                offset += num_bytes
                self.num_bytes_scanned = offset

    def _read_rows(self, rows: list[int]) -> list[Record | RowError]:
        for row in rows:
            if not 0 <= row < len(self._offsets):
                raise IndexError(f"{self.path}: row {row} of {len(self._offsets)} scanned rows")
        items: dict[int, Record | RowError] = {}
        with self._open() as file:
            for row in sorted(set(rows)):  # ascending offsets are kind to disks
                offset = self._offsets[row]
                file.seek(offset)
                text, num_bytes = self._read_line(file, is_first=offset == 0)
                line = self._line_of(row)
                items[row] = self._to_item(text, num_bytes, row=row, line=line, offset=offset)
        return [items[row] for row in rows]

    def _line_of(self, row: int) -> int:
        return row + self._gap_sizes[bisect_right(self._gap_rows, row) - 1]

    def _open(self) -> BinaryIO:
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise UsageError(f"{self.path} cannot be opened: {error.strerror}.") from error

    def _read_line(self, file: BinaryIO, *, is_first: bool) -> tuple[bytes | None, int]:
        """Return the line without its end (None if it is too long), and its bytes in the file."""
        raw = file.readline(self._max_line_bytes + 1)
        num_bytes = len(raw)
        if num_bytes > self._max_line_bytes and not raw.endswith(b"\n"):
            while not raw.endswith(b"\n") and (raw := file.readline(_SKIP_BYTES)):
                num_bytes += len(raw)
            return None, num_bytes
        if is_first:
            raw = raw.removeprefix(_BOM)
        return raw.removesuffix(b"\n").removesuffix(b"\r"), num_bytes

    def _to_item(
        self, raw: bytes | None, num_bytes: int, *, row: int, line: int, offset: int
    ) -> Record | RowError:
        try:
            if raw is None:
                raise RecordError(
                    f"the line has {num_bytes:,} bytes; at most {self._max_line_bytes:,} are read. "
                    "Shorten it; if the whole file is one line, it is not one row a line"
                )
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                raise RecordError(
                    f"the line is not UTF-8: byte 0x{raw[error.start]:02x} at position "
                    f"{error.start}; convert the file, for example with iconv"
                ) from None
            return self._parse(text, row=row, line=line, offset=offset)
        except RecordError as error:
            return RowError(row, line, error.id, "read", str(error), offset)

    @abstractmethod
    def _parse(self, text: str, *, row: int, line: int, offset: int) -> Record: ...


class TextSource(LineSource):
    """One prompt a line, spaces kept; the id is the line number."""

    _has_ids = False

    def _parse(self, text: str, *, row: int, line: int, offset: int) -> Record:
        return Record(row, line, line, text, None, RowOptions(), offset)


class JsonLinesSource(LineSource):
    """One JSON object a line, as `parse_record` describes."""

    def _parse(self, text: str, *, row: int, line: int, offset: int) -> Record:
        try:
            obj = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecordError(
                f"the line is not JSON: {error.msg} at character {error.pos + 1} of {len(text)}"
            ) from None
        except RecursionError:
            raise RecordError("the line is not usable: its JSON is nested too deeply") from None
        except ValueError as error:  # an int of more digits than Python converts
            raise RecordError(f"the line is not usable: {error}") from None
        return parse_record(obj, row=row, line=line, offset=offset)
