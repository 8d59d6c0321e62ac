"""Embed: one vector per row."""

from collections.abc import Sequence
from typing import Any

import torch
from typing_extensions import override

from moe_lightning.data.records import Row, RowError
from moe_lightning.modeling.runner import ModelRunner
from moe_lightning.tasks.task import Progress, Task, not_finite


class Embed(Task):
    """Mean of the last hidden state over a row's tokens."""

    @override
    def run(
        self, runner: ModelRunner, rows: Sequence[Row], *, budget_tokens: int, progress: Progress
    ) -> list[dict[str, Any] | RowError]:
        batch = runner.pad([row.token_ids for row in rows], side="right")
        hidden_BSD = runner.last_hidden_state(batch).float()
        lengths = [len(row.token_ids) for row in rows]
        means_BD = torch.stack(
            [h[:n].mean(0) for h, n in zip(hidden_BSD, lengths, strict=True)]
        ).cpu()
        progress(len(rows), sum(lengths), 0, batch.input_ids_BS.numel() - sum(lengths))
        is_finite = means_BD.isfinite().all(1).tolist()
        return [
            {"id": row.id, "embedding": mean.tolist()} if ok else not_finite(row, "hidden states")
            for row, mean, ok in zip(rows, means_BD, is_finite, strict=True)
        ]
