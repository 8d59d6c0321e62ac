"""ForwardTask: tasks that read a row once. A planned batch is split so that little is padding."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from moe_lightning.data.batching import split_by_length
from moe_lightning.data.records import Row, RowError
from moe_lightning.modeling.runner import ModelRunner, PaddedBatch
from moe_lightning.tasks.task import FORWARD_TOKENS, Progress, Task


class ForwardTask(Task):
    """A task that needs one forward over a row's tokens and nothing after it."""

    @override
    def run(
        self, runner: ModelRunner, rows: Sequence[Row], *, budget_tokens: int, progress: Progress
    ) -> list[dict[str, Any] | RowError]:
        lengths = [len(row.token_ids) for row in rows]
        answers: dict[int, dict[str, Any] | RowError] = {}
        for group in split_by_length(
            lengths, forward_tokens=FORWARD_TOKENS, budget_tokens=budget_tokens
        ):
            members = [rows[position] for position in group]
            batch = runner.pad([row.token_ids for row in members], side="right")
            answers.update(zip(group, self.answer(runner, members, batch), strict=True))
            num_tokens = sum(lengths[position] for position in group)
            progress(len(group), num_tokens, 0, batch.input_ids_BS.numel() - num_tokens)
        return [answers[position] for position in range(len(rows))]

    @abstractmethod
    def answer(
        self, runner: ModelRunner, rows: Sequence[Row], batch: PaddedBatch
    ) -> list[dict[str, Any] | RowError]:
        """Compute the rows of one forward.

        Args:
            runner: The model.
            rows: The rows.
            batch: Their tokens, padded on the right.

        Returns:
            For each row, in the order given, its answer or why there is none.
        """
