"""What `predict_step` gets: batches of our plan, or of a user's own dataloader.

plan, input file ── PlannedBatches ──┐
                                     ├──▶ RowBatch
list, dict, tensors ── as_row_batch ─┘
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from moe_lightning.data.encode import Encoder
from moe_lightning.data.fields import type_name
from moe_lightning.data.records import (
    Record,
    RecordError,
    Row,
    RowBatch,
    RowError,
    parse_record,
)
from moe_lightning.data.row_store import RowStore
from moe_lightning.data.source import RowSource
from moe_lightning.jobs.plan import WorkUnit, work_units

_ACCEPTED = (
    "a batch for predict must be a RowBatch, a list of prompts, a list of dicts like "
    '{"prompt": ...} or {"messages": ...}, a dict of columns with "prompt" or "messages", or a '
    'dict with "input_ids" [B, S] (and "attention_mask")'
)
_OPTIONS = ("max_new_tokens", "temperature", "top_p", "seed", "stop")


class PlannedBatches(Dataset[RowBatch]):
    """The planned batches of an input file, each read when it is asked for.

    Args:
        batches: Row numbers of each batch.
        source: The scanned input.
        encoder: Tokenises the rows.
        store: The rows in memory, or None to read and tokenise them again.

    Attributes:
        is_done_N: For each row of the input, whether it was done by an earlier run; those are left
            out. None if there was none.
        suspects: Rows that are computed alone, since one of them ended an earlier run.
    """

    def __init__(
        self,
        batches: Sequence[NDArray[np.int64]],
        *,
        source: RowSource,
        encoder: Encoder,
        store: RowStore | None,
    ) -> None:
        self._batches = batches
        self._source = source
        self._encoder = encoder
        self._store = store
        self.is_done_N: NDArray[np.bool_] | None = None
        self.suspects: Collection[int] = ()
        self._units: list[WorkUnit] | None = None

    def __len__(self) -> int:
        return len(self._all_units())

    def __getitem__(self, index: int) -> RowBatch:
        return self.read(self._all_units()[index])

    def units(self, num_ranks: int) -> list[WorkUnit]:
        """What so many ranks have to do, all of it, in order; see ``jobs.work_units``."""
        return work_units(
            self._batches, num_ranks=num_ranks, is_done_N=self.is_done_N, alone=self.suspects
        )

    def read(self, unit: WorkUnit) -> RowBatch:
        """Return the rows of a unit."""
        numbers = unit.rows.tolist()
        if self._store is not None:
            return RowBatch(unit.number, [self._store.get(row) for row in numbers], [])
        return _encode(self._source.read(numbers), self._encoder, index=unit.number)

    def _all_units(self) -> list[WorkUnit]:
        if self._units is None:
            self._units = self.units(1)
        return self._units


def as_row_batch(batch: object, encoder: Encoder, *, index: int, first_id: int = 0) -> RowBatch:
    """Bring what a user's own dataloader yields into the form of planned batches.

    Args:
        batch: A RowBatch (returned as it is); a list or tuple of prompts; a list of dicts as in the
            input file; a dict of columns, as torch's default collation makes of dict rows; or a
            dict with `input_ids`, a tensor [B, S] of ints, and `attention_mask` [B, S], whose zeros
            are left out.
        encoder: Tokenises the texts.
        index: Number of the batch.
        first_id: Number of the batch's first row; rows without an id are named by their number.

    Returns:
        The batch; rows that cannot be used are in its `errors`.

    Raises:
        TypeError: If the batch is none of these.
    """
    if isinstance(batch, RowBatch):
        return batch
    if isinstance(batch, Mapping):
        if "input_ids" in batch:
            return _from_token_ids(batch, encoder, index=index, first_id=first_id)
        objects: list[Any] = _rows_of_columns(batch)
    elif isinstance(batch, list | tuple):
        if all(isinstance(item, str) for item in batch):
            objects = [{"prompt": item} for item in batch]
        elif all(isinstance(item, Mapping) for item in batch):
            objects = list(batch)
        else:
            raise TypeError(
                f"{_ACCEPTED}; this one is {type_name(batch)} of "
                f"{sorted({type_name(item) for item in batch})}"
            )
    else:
        raise TypeError(f"{_ACCEPTED}; this one is {type_name(batch)}")
    items: list[Record | RowError] = []
    for row, obj in enumerate(objects, start=first_id):
        try:
            items.append(parse_record(obj, row=row, line=row))  # `line` is the default id
        except RecordError as error:
            row_id = row if error.id is None else error.id
            items.append(RowError(row, None, row_id, "read", str(error)))
    encoded = _encode(items, encoder, index=index)
    # These rows have no lines in a file.
    encoded.errors = [RowError(e.row, None, e.id, e.stage, e.error) for e in encoded.errors]
    return encoded


def _encode(items: Sequence[Record | RowError], encoder: Encoder, *, index: int) -> RowBatch:
    encoded = encoder.encode([item for item in items if isinstance(item, Record)])
    errors = [item for item in [*items, *encoded] if isinstance(item, RowError)]
    return RowBatch(index, [row for row in encoded if isinstance(row, Row)], errors)


def _column(values: object, name: str) -> list[Any]:
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise TypeError(f"{_ACCEPTED}; the column {name!r} of this one is {type_name(values)}")
    return list(values)


def _rows_of_columns(batch: Mapping[Any, Any]) -> list[dict[str, Any]]:
    names = [n for n in ("id", "prompt", "messages", *_OPTIONS) if batch.get(n) is not None]
    if "prompt" not in names and "messages" not in names:
        raise TypeError(f"{_ACCEPTED}; this one is a dict with {sorted(map(str, batch))}")
    columns = {name: _column(batch[name], name) for name in names}
    _check_columns(columns)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _check_columns(columns: Mapping[str, list[Any]]) -> None:
    """Refuse unequal columns, and columns of lists, which torch's default collation transposes."""
    stop_is_flat = all(s is None or isinstance(s, str) for s in columns.get("stop", []))
    messages_are_lists = all(
        m is None or isinstance(m, list | tuple) for m in columns.get("messages", [])
    )
    if not stop_is_flat or not messages_are_lists:
        name = "messages" if stop_is_flat else "stop"
        raise TypeError(
            f"{_ACCEPTED}; the column {name!r} of this one may have been transposed by torch's "
            "default collation; give the DataLoader collate_fn=list"
        )
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise TypeError(f"{_ACCEPTED}; the columns of this one differ in length: {lengths}")


def _from_token_ids(
    batch: Mapping[Any, Any], encoder: Encoder, *, index: int, first_id: int
) -> RowBatch:
    input_ids, mask = batch["input_ids"], batch.get("attention_mask")
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        shown = list(input_ids.shape) if isinstance(input_ids, Tensor) else type_name(input_ids)
        raise TypeError(f'{_ACCEPTED}; "input_ids" of this one is {shown}')
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != input_ids.shape):
        shown = list(mask.shape) if isinstance(mask, Tensor) else type_name(mask)
        raise TypeError(
            f'{_ACCEPTED}; "attention_mask" of this one is {shown}, "input_ids" '
            f"{list(input_ids.shape)}"
        )
    token_ids = input_ids.tolist()
    if mask is not None:
        kept = mask.bool().tolist()
        token_ids = [
            [token for token, is_kept in zip(*pair, strict=True) if is_kept]
            for pair in zip(token_ids, kept, strict=True)
        ]
    columns = {n: _column(batch[n], n) for n in ("id", *_OPTIONS) if batch.get(n) is not None}
    _check_columns(columns | {"input_ids": token_ids})
    rows: list[Row] = []
    errors: list[RowError] = []
    for i, tokens in enumerate(token_ids):
        row = first_id + i
        fields = {name: column[i] for name, column in columns.items()}
        try:
            record = parse_record({**fields, "prompt": ""}, row=row, line=row)
        except RecordError as bad:
            row_id = row if bad.id is None else bad.id
            errors.append(RowError(row, None, row_id, "read", str(bad)))
            continue
        error = encoder.check_tokens(tokens)
        if error is None:
            rows.append(Row(row, row, record.id, tokens, record.options))
        else:
            errors.append(RowError(row, None, record.id, "encode", error))
    return RowBatch(index, rows, errors)
