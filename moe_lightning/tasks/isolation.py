"""One bad row costs one row: a batch that raises is split until the row is found."""

from collections.abc import Sequence
from typing import Any

import torch

from moe_lightning.data.records import Row, RowBatch, RowError
from moe_lightning.errors import MoELightningError
from moe_lightning.modeling.runner import ModelRunner
from moe_lightning.tasks.task import Progress, Task


class Predictions(list[dict[str, Any]]):
    """One dict per row of a batch: its answer, or the keys of ``errors.jsonl``.

    Attributes:
        row_numbers: Position in the input of each row.
        has_failed: Whether each row failed.
        num_not_finite: Rows for which the model gave NaN or infinity.
    """

    def __init__(self, results: Sequence[tuple[int, dict[str, Any] | RowError]]) -> None:
        super().__init__(r.to_json() if isinstance(r, RowError) else r for _, r in results)
        self.row_numbers = [number for number, _ in results]
        self.has_failed = [isinstance(r, RowError) for _, r in results]
        self.num_not_finite = sum(
            isinstance(r, RowError) and "NaN or infinite" in r.error for _, r in results
        )

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
    """

    def run(rows: Sequence[Row]) -> list[dict[str, Any] | RowError]:
        if not rows:
            return []
        try:
            return task.run(runner, rows, budget_tokens=budget_tokens, progress=progress)
        except (torch.OutOfMemoryError, MemoryError, MoELightningError):
            raise
        except Exception as error:
            if len(rows) > 1:
                half = len(rows) // 2
                return run(rows[:half]) + run(rows[half:])
            (row,) = rows
            message = f"the model raised {type(error).__name__}: {error}"
            return [RowError(row=row.row, line=row.line, id=row.id, stage="compute", error=message)]

    answers = [(row.row, answer) for row, answer in zip(batch.rows, run(batch.rows), strict=True)]
    return Predictions(answers + [(error.row, error) for error in batch.errors])
