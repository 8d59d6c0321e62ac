"""Embed: one vector per row."""

from collections.abc import Sequence
from typing import Any

import torch
from typing_extensions import override

from moe_lightning.data.records import Row, RowError
from moe_lightning.modeling.runner import ModelRunner, PaddedBatch
from moe_lightning.tasks.forward_task import ForwardTask
from moe_lightning.tasks.task import not_finite


class Embed(ForwardTask):
    """Mean of the last hidden state over a row's tokens."""

    @override
    def answer(
        self, runner: ModelRunner, rows: Sequence[Row], batch: PaddedBatch
    ) -> list[dict[str, Any] | RowError]:
        hidden_BSD = runner.last_hidden_state(batch).float()
        lengths = [len(row.token_ids) for row in rows]
        means = [h[:n].mean(0) for h, n in zip(hidden_BSD, lengths, strict=True)]
        means_BD = torch.stack(means).cpu()
        is_finite = means_BD.isfinite().all(1).tolist()
        return [
            {"id": row.id, "embedding": mean.tolist()} if ok else not_finite(row, "hidden states")
            for row, mean, ok in zip(rows, means_BD, is_finite, strict=True)
        ]
