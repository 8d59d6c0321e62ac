"""What every kind of input file offers: one pass in order, then any rows again."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_lightning.data.records import Record, RowError
from moe_lightning.data.row_ids import DuplicateRows, IdIndex
from moe_lightning.errors import UsageError


class RowSource(ABC):
    """An input file as a sequence of rows, read without holding it in memory.

    Args:
        path: The file; it must not change while it is in use.

    Attributes:
        num_bytes: Size of the file.
        num_bytes_scanned: How far the current `scan` is, for a progress bar.
    """

    _has_ids = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._signature = _signature(path)
        self.num_bytes = self._signature[0]
        self.num_bytes_scanned = 0
        self._duplicates = DuplicateRows()

    def scan(self) -> Iterator[Record | RowError]:
        """Read the whole file once, in order. Stopping early is legal.

        Returns:
            An iterator over all rows, good and bad, numbered from 0 without gaps.

        Raises:
            UsageError: If the file changed, vanished or is damaged as a whole.
        """
        self.check_unchanged()
        self.num_bytes_scanned = 0
        self._duplicates = DuplicateRows()
        ids = IdIndex() if self._has_ids else None
        for item in self._scan_rows():
            if ids is not None and isinstance(item, Record):
                first_row = ids.add(item.id, row=item.row)
                if first_row is not None:
                    self._duplicates.add(item.row, first_row=first_row)
                    item = self._duplicate_error(item, first_row)
            yield item
        self.check_unchanged()

    def read(self, rows: Sequence[int]) -> list[Record | RowError]:
        """Read rows again that `scan` has passed.

        Args:
            rows: Row numbers in any order.

        Returns:
            What `scan` gave for them, in the order asked for.

        Raises:
            UsageError: If the file has changed since it was opened.
            IndexError: If `scan` has not passed a row.
        """
        self.check_unchanged()
        items = self._read_rows([int(row) for row in rows])
        for i, item in enumerate(items):
            first_row = self._duplicates.first_row(item.row)
            if first_row is not None and isinstance(item, Record):
                items[i] = self._duplicate_error(item, first_row)
        self.check_unchanged()
        return items

    def check_unchanged(self) -> None:
        """Raise UsageError if the file's size or time of change differ from when it was opened."""
        now = _signature(self.path)
        if now != self._signature:
            raise UsageError(
                f"{self.path} changed while it was in use: it had {self._signature[0]:,} bytes, "
                f"now {now[0]:,} (or was rewritten). The rows no longer match the plan; start "
                "again and leave the file alone until the end."
            )

    @abstractmethod
    def _scan_rows(self) -> Iterator[Record | RowError]: ...

    @abstractmethod
    def _read_rows(self, rows: list[int]) -> list[Record | RowError]: ...

    @abstractmethod
    def _line_of(self, row: int) -> int: ...

    def _duplicate_error(self, record: Record, first_row: int) -> RowError:
        line = self._line_of(first_row)
        return RowError(
            row=record.row,
            line=record.line,
            id=record.id,
            stage="read",
            error=f"the id {record.id!r} is that of line {line} already; give every row its own id",
            offset=record.offset,
        )


def _signature(path: Path) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UsageError(
            f"{path} can no longer be read ({error.strerror}); put it back and start again."
        ) from error
    return stat.st_size, stat.st_mtime_ns
