"""BatchMarks: notes the rows that a rank begins to compute, so that it is known what was lost."""

import json
import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

MARKS = "CHAOS_JOB_MARKS"
"""Names the file, in the environment."""


class BatchMarks(Callback):
    """Adds a line, ``[rank, [row, ...]]``, for each batch when it begins."""

    @override
    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        line = json.dumps([trainer.global_rank, [row.row for row in batch.rows]]) + "\n"
        fd = os.open(os.environ[MARKS], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(fd, line.encode())  # in one piece, whatever comes next
        os.close(fd)
