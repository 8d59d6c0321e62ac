"""Parquet inputs, read by row group.

Random access costs a row group, so the last ones used stay in memory up to a limit; the rows of a
planned batch come from one window of neighbouring rows, so that few groups are read twice.
"""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lightning.data.records import Record, RecordError, RowError, parse_record
from moe_lightning.data.source import RowSource
from moe_lightning.errors import UsageError

_OPTION_COLUMNS = ("max_new_tokens", "temperature", "top_p", "seed", "stop")
_COLUMNS = ("id", "prompt", "messages", *_OPTION_COLUMNS)
_SCAN_ROWS = 1024


class ParquetSource(RowSource):
    """Rows of a Parquet file with the columns `prompt` or `messages`, and optional ones.

    Args:
        path: The file.
        cache_bytes: Size of the row groups that stay in memory; the last one always does.

    Raises:
        UsageError: If the file is no Parquet file or lacks the columns.
    """

    def __init__(self, path: Path, *, cache_bytes: int = 256 * 2**20) -> None:
        super().__init__(path)
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[int, Any] = OrderedDict()
        file = self._open()
        with file:
            self._columns = _check_columns(path, file.schema_arrow)
            metadata = file.metadata
            sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self._group_starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._num_scanned = 0

    def _open(self) -> Any:
        try:
            return pq.ParquetFile(self.path)
        except Exception as error:
            raise UsageError(
                f"{self.path} cannot be read as Parquet ({_one_line(error)}); it is cut short or "
                "of another format. Write it again, or name its format with --data.format."
            ) from error

    def _scan_rows(self) -> Iterator[Record | RowError]:
        self._num_scanned = 0
        num_rows = int(self._group_starts[-1])
        with self._open() as file:
            for group in range(len(self._group_starts) - 1):
                for batch in self._batches(file, group):
                    for obj in _to_objects(batch):
                        row = self._num_scanned
                        self._num_scanned += 1
                        yield _to_item(obj, row)
                    self.num_bytes_scanned = self.num_bytes * self._num_scanned // num_rows
        self.num_bytes_scanned = self.num_bytes

    def _batches(self, file: Any, group: int) -> Iterator[Any]:
        try:
            yield from file.iter_batches(
                batch_size=_SCAN_ROWS, row_groups=[group], columns=self._columns, use_threads=False
            )
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(group, error) from error

    def _damaged(self, group: int, error: Exception) -> UsageError:
        return UsageError(
            f"{self.path}: row group {group} (rows from {self._group_starts[group]}) cannot be "
            f"read ({_one_line(error)}). The file is damaged; write it again."
        )

    def _read_rows(self, rows: list[int]) -> list[Record | RowError]:
        for row in rows:
            if not 0 <= row < self._num_scanned:
                raise IndexError(f"{self.path}: row {row} of {self._num_scanned} scanned rows")
        items: dict[int, Record | RowError] = {}
        for row in sorted(set(rows)):
            group = int(np.searchsorted(self._group_starts, row, side="right")) - 1
            table = self._group(group)
            [obj] = _to_objects(table.slice(row - int(self._group_starts[group]), 1))
            items[row] = _to_item(obj, row)
        return [items[row] for row in rows]

    def _group(self, group: int) -> Any:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        with self._open() as file:
            try:
                table = file.read_row_group(group, columns=self._columns, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise self._damaged(group, error) from error
        self._cache[group] = table
        while len(self._cache) > 1 and sum(t.nbytes for t in self._cache.values()) > (
            self._cache_bytes
        ):
            self._cache.popitem(last=False)
        return table

    def _line_of(self, row: int) -> int:
        return row + 1


def _check_columns(path: Path, schema: Any) -> list[str]:
    names = list(schema.names)
    columns = [name for name in _COLUMNS if name in names]
    if "prompt" not in names and "messages" not in names:
        raise UsageError(
            f"{path} has the columns {names}, but neither 'prompt' nor 'messages'; rename the "
            "column of the texts to 'prompt'."
        )
    for name in columns:
        if names.count(name) > 1:
            raise UsageError(f"{path} has {names.count(name)} columns named {name!r}; keep one.")
        kind = schema.field(name).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        is_text = any(
            is_kind(kind)
            for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        )
        is_null = pa.types.is_null(kind)
        wanted = {
            "id": "strings or whole numbers" * (not (is_text or pa.types.is_integer(kind))),
            "prompt": "strings" * (not is_text),
            "messages": "lists of {role, content}" * (not _is_list_of_structs(kind)),
        }.get(name, "")
        if wanted and not is_null:
            raise UsageError(
                f"{path}: the column {name!r} holds {kind}, but must hold {wanted}; cast it."
            )
    return columns


def _one_line(error: Exception) -> str:
    return " ".join(str(error).encode(errors="backslashreplace").decode().split())


def _is_list_of_structs(kind: Any) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(is_list and pa.types.is_struct(kind.value_type))


def _to_objects(batch: Any) -> list[dict[str, Any] | Exception]:
    """Turn arrow rows into Python; a cell that has no Python value spoils its own row only."""
    try:
        return list(batch.to_pylist())
    except Exception as error:
        if batch.num_rows == 1:
            return [error]
        return [_to_objects(batch.slice(i, 1))[0] for i in range(batch.num_rows)]


def _to_item(obj: dict[str, Any] | Exception, row: int) -> Record | RowError:
    try:
        if isinstance(obj, Exception):
            raise RecordError(f"a cell of the row cannot be read: {_one_line(obj)}")
        # pandas stores whole numbers with gaps as floats.
        for name in ("max_new_tokens", "seed"):
            value = obj.get(name)
            if isinstance(value, float) and value.is_integer():
                obj[name] = int(value)
        return parse_record(obj, row=row, line=row + 1)
    except RecordError as error:
        return RowError(row=row, line=row + 1, id=error.id, stage="read", error=str(error))
