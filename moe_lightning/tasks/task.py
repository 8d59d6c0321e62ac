"""Task: the interface between a planned batch of rows and a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_lightning.data.records import Row, RowError
from moe_lightning.modeling.runner import ModelRunner

FORWARD_TOKENS = 256  # what a forward costs besides its tokens, counted in tokens (measured, CPU)

Progress = Callable[[int, int, int, int], None]
"""Called with the increase in (rows, prompt tokens, new tokens, padding tokens)."""


NOT_FINITE = "the model gave NaN or infinite"


class Task(ABC):
    """What to compute for every row.

    Attributes:
        rows_factor: A planned batch holds this many times the token budget, because rows that
            finish early are replaced from the rest of the batch. 1 if all rows are computed at
            once.
        add_generation_prompt: Whether ``messages`` end with the header of the assistant's turn.
        default_max_new_tokens: New tokens of a row that does not say how many.
    """

    rows_factor: int = 1
    add_generation_prompt: ClassVar[bool] = False
    default_max_new_tokens: int = 0

    def identity(self) -> dict[str, Any]:
        """What decides the answers: the class and its attributes that are plain values.

        Returns:
            Plain values.
        """
        return {"name": type(self).__name__} | {
            name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in vars(self).items()
            if not callable(value)
        }

    def planned_tokens(
        self, num_prompt_tokens_N: NDArray[np.int64], max_new_tokens_N: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """How many tokens of the budget each row takes.

        Args:
            num_prompt_tokens_N: Tokens of each row's prompt.
            max_new_tokens_N: New tokens each row may take.

        Returns:
            Tokens per row.
        """
        return num_prompt_tokens_N + max_new_tokens_N

    @abstractmethod
    def run(
        self, runner: ModelRunner, rows: Sequence[Row], *, budget_tokens: int, progress: Progress
    ) -> list[dict[str, Any] | RowError]:
        """Compute one planned batch.

        Args:
            runner: The model.
            rows: The rows, none empty, none longer than the model's positions.
            budget_tokens: Tokens that may be in flight at once, padding included.
            progress: Called as rows and tokens are done.

        Returns:
            For each row, in the order given, its answer or why there is none.
        """


def not_finite(row: Row, what: str) -> RowError:
    """The error of a row for which the model gave NaN or infinity."""
    return RowError(
        row=row.row,
        line=row.line,
        id=row.id,
        stage="compute",
        error=f"{NOT_FINITE} {what} for this row; if many rows fail, look for "
        "bad weights with --model.check_weights true, or use a wider --model.dtype",
        offset=row.offset,
    )
