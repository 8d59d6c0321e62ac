"""Watched: the task of verify. It generates, then computes every prompt once more, looked at."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.data.batching import split_by_length
from moe_lightning.data.records import Row, RowError, RowOptions
from moe_lightning.modeling.runner import ModelRunner
from moe_lightning.tasks.generate import Generate
from moe_lightning.tasks.task import FORWARD_TOKENS, Progress, Task
from moe_lightning.verification.capture import Capture
from moe_lightning.verification.folder import RowFacts, RowFolder

BATCH_TOKENS = 1024  # logits of all of them are in memory at once
LOGIT_POSITIONS = 64  # of a row are kept


class Watched(Task):
    """Greedy tokens of every row, and what one forward over its prompt computes.

    Args:
        capture: Who writes down what is computed.
        max_new_tokens: Tokens to generate.
        max_prompt_tokens: Longer prompts are cut.
    """

    add_generation_prompt: ClassVar[bool] = True

    def __init__(self, capture: Capture, *, max_new_tokens: int, max_prompt_tokens: int) -> None:
        self.capture = capture
        self.default_max_new_tokens = max_new_tokens
        self.max_prompt_tokens = max_prompt_tokens
        self._generate = Generate(max_new_tokens=max_new_tokens, repetition_penalty=1.0)

    @override
    def run(
        self, runner: ModelRunner, rows: Sequence[Row], *, budget_tokens: int, progress: Progress
    ) -> list[dict[str, Any] | RowError]:
        # What rows say of sampling does not hold here: greedy tokens can be compared.
        used = [
            replace(row, token_ids=row.token_ids[: self.max_prompt_tokens], options=RowOptions())
            for row in rows
        ]
        answers = self._generate.run(runner, used, budget_tokens=budget_tokens, progress=progress)
        if self.capture.is_writer:
            for row, cut, answer in zip(rows, used, answers, strict=True):
                RowFolder(self.capture.parent, row.row).save_facts(_facts(row, cut, answer))
        lengths = [len(row.token_ids) for row in used]
        for group in split_by_length(
            lengths, forward_tokens=FORWARD_TOKENS, budget_tokens=min(budget_tokens, BATCH_TOKENS)
        ):
            self._watch(runner, [used[position] for position in group])
        return answers

    def _watch(self, runner: ModelRunner, rows: Sequence[Row]) -> None:
        lengths = [len(row.token_ids) for row in rows]
        numbers = [row.row for row in rows]
        batch = runner.pad([row.token_ids for row in rows], side="right")
        with self.capture.over(runner.model, numbers, lengths, batch):
            logits_BSV = runner.logits(batch)
        if not self.capture.is_writer:
            return
        for place, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            positions_P = kept_positions(length)
            logits_PV = logits_BSV[place, positions_P.to(logits_BSV.device)]
            RowFolder(self.capture.parent, number).save(
                "logits", positions=positions_P, logits=logits_PV
            )


def kept_positions(length: int) -> Tensor:
    """The positions of a row whose logits are kept: all, or some that are evenly apart."""
    number = min(length, LOGIT_POSITIONS)
    return torch.linspace(0, length - 1, number).round().long()


def _facts(row: Row, used: Row, answer: dict[str, Any] | RowError) -> RowFacts:
    return RowFacts(
        row=row.row,
        id=row.id,
        token_ids=used.token_ids,
        num_cut=len(row.token_ids) - len(used.token_ids),
        new_token_ids=[] if isinstance(answer, RowError) else answer["token_ids"],
        error=answer.error if isinstance(answer, RowError) else None,
    )
