"""Part files, in the order they were computed, merged to one file in the order of the input.

Only positions are held in memory, 40 bytes a row; answers are copied from file to file.
"""

import json
import os
from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lightning.files import atomic_writer

PARQUET_ROWS = 10_000  # rows of one row group


class Parts:
    """The rows of all part files of a directory.

    Args:
        directory: Where the parts are. Each line of a part is ``row TAB kind TAB json``.

    Attributes:
        rows_ok: Answered rows, sorted.
        rows_failed: Failed rows, sorted.
    """

    def __init__(self, directory: Path) -> None:
        self._paths = sorted(directory.glob("*.part"))
        found = array("q")
        for number, path in enumerate(self._paths):
            offset = 0
            with open(path, "rb") as file:
                for line in file:
                    row, kind, _ = line.split(b"\t", 2)
                    skip = len(row) + len(kind) + 2
                    found.extend(
                        (int(row), kind == b"ok", number, offset + skip, len(line) - skip - 1)
                    )
                    offset += len(line)
        places = np.array(found, dtype=np.int64).reshape(-1, 5)
        self._places = places[np.argsort(places[:, 0], kind="stable")]
        is_ok = self._places[:, 1] == 1
        self.rows_ok: list[int] = self._places[is_ok, 0].tolist()
        self.rows_failed: list[int] = self._places[~is_ok, 0].tolist()
        self._open = lru_cache(maxsize=64)(_OpenFile)

    def read(self, row: int) -> str:
        """The JSON of a row.

        Args:
            row: Position in the input.

        Returns:
            Its line, without the line end.
        """
        place = self._places[np.searchsorted(self._places[:, 0], row)]
        _, _, number, offset, length = place.tolist()
        return os.pread(self._open(self._paths[number]).fd, length, offset).decode()


class _OpenFile:
    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.fd)


def write_jsonl(parts: Parts, path: Path) -> None:
    """Write the answered rows as JSON lines.

    Args:
        parts: The parts.
        path: The file to write.
    """
    with atomic_writer(path) as file:
        for row in parts.rows_ok:
            file.write(parts.read(row).encode() + b"\n")


def write_parquet(parts: Parts, path: Path) -> None:
    """Write the answered rows as Parquet; ids become strings unless all are integers.

    Args:
        parts: The parts.
        path: The file to write.
    """
    ids = (json.loads(parts.read(row))["id"] for row in parts.rows_ok)
    has_text_ids = not all(isinstance(i, int) and -(2**63) <= i < 2**63 for i in ids)
    with atomic_writer(path) as file:
        writer: pq.ParquetWriter | None = None
        for rows in _chunks(parts):
            if has_text_ids:
                rows = [row | {"id": str(row["id"])} for row in rows]
            table = pa.Table.from_pylist(rows, schema=writer.schema if writer else None)
            if writer is None:
                schema = pa.schema([(f.name, _TYPES.get(f.name, f.type)) for f in table.schema])
                table = table.cast(schema)
                writer = pq.ParquetWriter(file, schema)
            writer.write_table(table)
        if writer is None:
            writer = pq.ParquetWriter(file, pa.schema([("id", pa.string())]))
        writer.close()


# Lists that are empty in all rows of the first group would have no type.
_TYPES = {"token_ids": pa.list_(pa.int64()), "embedding": pa.list_(pa.float64())}


def _chunks(parts: Parts) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(parts.rows_ok), PARQUET_ROWS):
        yield [json.loads(parts.read(row)) for row in parts.rows_ok[start : start + PARQUET_ROWS]]
