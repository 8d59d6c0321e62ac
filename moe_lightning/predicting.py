"""PredictingHooks: the half of MoELightningModule that Lightning calls in predict."""

from typing import Any

import lightning as L
import torch
from typing_extensions import override

from moe_lightning.data.batches import as_row_batch
from moe_lightning.data.encode import Encoder
from moe_lightning.data.rank_batches import NumberedBatch
from moe_lightning.data.records import RowBatch
from moe_lightning.errors import CheckpointError, MoELightningError
from moe_lightning.modeling.runner import ModelRunner
from moe_lightning.strategies import HostedModel
from moe_lightning.strategies.rank_failures import is_group_failure
from moe_lightning.tally import Tally
from moe_lightning.tasks import Task
from moe_lightning.tasks.isolation import BadBatchError, Predictions, run_isolated
from moe_lightning.tasks.memory import out_of_memory


class PredictingHooks(L.LightningModule):
    """Answers rows with a hosted model.

    Attributes:
        checkpoint: Of the model, for messages.
        task: What is computed for a row.
        batch_budget_tokens: Tokens in flight at once, where no datamodule says so.
        runner: Calls the model, once it is loaded.
        hosted: The model, and what is known of it.
        tally: Counts what was done.
    """

    checkpoint: str
    task: Task
    batch_budget_tokens: int
    runner: ModelRunner | None
    hosted: HostedModel | None
    tally: Tally
    _next_row: int

    @property
    def encoder(self) -> Encoder:
        """Turns prompts into token ids."""
        raise NotImplementedError

    @override
    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Rows stay on the host, where their batches are built; training batches move."""
        if isinstance(batch, dict) and "labels" in batch:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Predictions:
        """Compute the task for one batch of rows.

        Args:
            batch: A RowBatch of PromptData, or what your own dataloader yields: a list of prompts,
                a list of dicts with ``prompt`` or ``messages``, the dict of lists that PyTorch
                collates from such dicts, or a dict with ``input_ids`` and ``attention_mask``.
            batch_idx: Number of the batch.
            dataloader_idx: Number of the dataloader.

        Returns:
            One dict per row, in the order of the batch; a row that failed has the keys of
            ``errors.jsonl``.

        Raises:
            OutOfMemoryError: If memory runs out, with the numbers and what to do.
            BadBatchError: If the model raises, and other ranks take part in its forwards.
            CheckpointError: If every row of the first batch gives NaN, which is the weights' fault.
        """
        assert self.runner is not None, "configure_model has not run"
        rows = self._rows(batch, batch_idx)
        budget = self._budget_tokens()
        # Of ranks that compute the same rows, one counts them.
        progress = self.tally.add if self._counts_rows() else _count_nothing
        try:
            predictions = run_isolated(
                self.task, self.runner, rows, budget_tokens=budget, progress=progress
            )
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise out_of_memory(error, rows, budget_tokens=budget) from error
        except MoELightningError:
            raise
        except Exception as error:  # with other ranks in the middle of the same forward
            if is_group_failure(error) or not rows.rows:
                raise
            raise BadBatchError(rows, error) from error
        # Callbacks may have the ranks meet after each batch; one with fewer forwards comes along.
        self.runner.idle()
        if self.tally.num_batches == 0 and predictions.num_not_finite == len(rows.rows) > 0:
            raise CheckpointError(
                f"{self.checkpoint}: the model gives NaN for every row of the first batch. Its "
                "weights are bad, or too large for its precision. Find the tensor with "
                "--model.check_weights true, or try --model.dtype float32."
            )
        self.tally.end_batch(num_errors=predictions.num_errors if self._counts_rows() else 0)
        return predictions

    @override
    def on_predict_epoch_end(self) -> None:
        assert self.runner is not None, "configure_model has not run"
        self.runner.idle()

    def _rows(self, batch: Any, batch_idx: int) -> RowBatch:
        index, first_row = batch_idx, self._next_row
        if isinstance(batch, NumberedBatch):
            batch, index, first_row = batch.batch, batch.index, batch.first_row
        rows = as_row_batch(batch, self.encoder, index=index, first_id=first_row)
        if rows is not batch:
            self._next_row = first_row + len(rows.rows) + len(rows.errors)
        return rows

    def _counts_rows(self) -> bool:
        strategy = None if self._trainer is None else self._trainer.strategy
        return bool(getattr(strategy, "writes_rows", True))

    def _budget_tokens(self) -> int:
        datamodule = getattr(self._trainer, "datamodule", None)
        return int(getattr(datamodule, "budget_tokens", self.batch_budget_tokens))

    @override
    def on_predict_start(self) -> None:
        assert self.hosted is not None, "configure_model has not run"
        self.hosted.pack()
        self.tally.reset()
        self._next_row = 0


def _count_nothing(*_: int) -> None:
    pass
