"""The files that a finished job leaves: predictions and errors in the order of the input."""

import json
from collections.abc import Iterable, Iterator
from heapq import merge
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lightning.jobs.parts import Parts

Format = Literal["jsonl", "parquet"]
PARQUET_ROWS = 10_000  # rows of one row group


def write_predictions(parts: Parts, file: BinaryIO, format: Format) -> None:
    """Write the answered rows.

    Args:
        parts: The parts.
        file: Where to.
        format: JSON lines, or Parquet, where ids become strings unless all are integers.
    """
    if format == "parquet":
        _write_parquet(parts, file)
        return
    for row in parts.rows_ok:
        file.write(parts.read(int(row)) + b"\n")


def write_errors(
    parts: Parts, input_errors: Iterable[tuple[int, str]], file: BinaryIO
) -> tuple[int, int]:
    """Write the failed rows as JSON lines.

    Args:
        parts: The parts.
        input_errors: Rows that never came so far: row number and JSON, sorted by row.
        file: Where to.

    Returns:
        How many there were, of the input and in all.
    """
    computed = ((int(row), parts.read(int(row)), 0) for row in parts.rows_failed)
    read = ((row, text.encode(), 1) for row, text in input_errors)
    num_input = num_all = 0
    for _, text, is_of_input in merge(computed, read):
        file.write(text + b"\n")
        num_all += 1
        num_input += is_of_input
    return num_input, num_all


def _write_parquet(parts: Parts, file: BinaryIO) -> None:
    ids = (json.loads(parts.read(int(row)))["id"] for row in parts.rows_ok)
    has_text_ids = not all(isinstance(i, int) and -(2**63) <= i < 2**63 for i in ids)
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
    rows = parts.rows_ok
    for start in range(0, len(rows), PARQUET_ROWS):
        chunk = rows[start : start + PARQUET_ROWS]
        yield [json.loads(parts.read(int(row))) for row in np.asarray(chunk)]
