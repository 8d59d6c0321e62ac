"""One bad row costs one row: a batch that raises is split until the row is found."""

from collections.abc import Iterator, Sequence
from operator import add
from typing import Any

import torch

from moe_lightning.data.records import Row, RowBatch, RowError
from moe_lightning.errors import MoELightningError, StoppedError
from moe_lightning.modeling.runner import ModelRunner
from moe_lightning.tasks.task import NOT_FINITE, Progress, Task


class BadBatchError(StoppedError):
    """The model raised for a batch that other ranks compute with this one, so all of them end.

    Args:
        batch: The batch, one or more rows of which are to blame.
        error: What the model raised.
    """

    def __init__(self, batch: RowBatch, error: Exception) -> None:
        self.errors = [_row_error(row, error) for row in batch.rows]
        if len(batch.rows) == 1:
            what, then = f"row {batch.rows[0].id!r}", "leaves that row out, in errors.jsonl"
        else:
            what = f"batch {batch.index} of {len(batch.rows)} rows"
            then = "computes these rows one at a time, to find the one to blame"
        super().__init__(
            f"the model raised {type(error).__name__}: {error} ({what}). The same command "
            f"continues, and {then}."
        )


class Predictions:
    """One dict per row of a batch: its answer, or the keys of ``errors.jsonl``.

    Deliberately no list: Lightning walks into lists, down to every number of an embedding, when it
    keeps predictions.

    Args:
        results: For each row, its position in the input, and its answer or error.

    Attributes:
        row_numbers: Position in the input of each row.
        has_failed: Whether each row failed.
        num_not_finite: Rows for which the model gave NaN or infinity.
    """

    def __init__(self, results: Sequence[tuple[int, dict[str, Any] | RowError]]) -> None:
        self._rows = [r.to_json() if isinstance(r, RowError) else r for _, r in results]
        self.row_numbers = [number for number, _ in results]
        self.has_failed = [isinstance(r, RowError) for _, r in results]
        self.num_not_finite = sum(
            isinstance(r, RowError) and r.error.startswith(NOT_FINITE) for _, r in results
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self._rows[position]

    def __repr__(self) -> str:
        return f"Predictions({self._rows!r})"

    @property
    def num_errors(self) -> int:
        """Rows that failed."""
        return sum(self.has_failed)


def run_isolated(
    task: Task, runner: ModelRunner, batch: RowBatch, *, budget_tokens: int, progress: Progress
) -> Predictions:
    """Compute a batch; rows that make the model raise become errors of their own.

    Args:
        task: What to compute.
        runner: The model.
        batch: The rows.
        budget_tokens: Tokens that may be in flight at once.
        progress: Called as rows and tokens are done.

    Returns:
        The predictions of all rows, in the order of the batch, then of the rows that had failed
        before.

    Raises:
        torch.OutOfMemoryError: If memory runs out: the budget's fault, not a row's.
        Exception: Whatever the model raises, if other ranks take part in its forwards.
    """

    def run(rows: Sequence[Row]) -> list[dict[str, Any] | RowError]:
        if not rows:
            return []
        counted = [0, 0, 0, 0]

        def count(*increase: int) -> None:
            counted[:] = map(add, counted, increase)
            progress(*increase)

        try:
            return task.run(runner, rows, budget_tokens=budget_tokens, progress=count)
        except (torch.OutOfMemoryError, MemoryError, MoELightningError):
            raise
        except Exception as error:
            if not runner.is_alone:
                raise  # other ranks are in the middle of the same forward
            progress(*(-n for n in counted))
            if len(rows) > 1:
                half = len(rows) // 2
                return run(rows[:half]) + run(rows[half:])
            (row,) = rows
            progress(1, 0, 0, 0)
            return [_row_error(row, error)]

    answers = [(row.row, answer) for row, answer in zip(batch.rows, run(batch.rows), strict=True)]
    progress(len(batch.errors), 0, 0, 0)
    return Predictions(answers + [(error.row, error) for error in batch.errors])


def _row_error(row: Row, error: Exception) -> RowError:
    message = f"the model raised {type(error).__name__}: {error}"
    return RowError(row.row, row.line, row.id, "compute", message, row.offset)
