"""RoutingBalance: how many rows each expert got."""

import sys
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from moe_lightning.callbacks.routing_counts import RoutingCounts
from moe_lightning.callbacks.routing_picture import draw_routing
from moe_lightning.callbacks.routing_summary import RoutingSummary
from moe_lightning.dispatch import LayerTrace, RoutingLog
from moe_lightning.errors import UsageError
from moe_lightning.files import write_atomically
from moe_lightning.placement.recording import Recording, save_recording

LAYERS_LOGGED = 64


class RoutingBalance(Callback):
    """Counts the rows of every expert in predict and fit, and writes ``routing_balance.json`` and
    ``routing_balance.png``.

    A row is one (token, expert) pair. Padding is not counted, nor are forwards that are repeated in
    backward, nor those of validation. The file is what the placement policy ``balanced`` reads.

    Args:
        output_dir: Where the files go. The default is the trainer's ``default_root_dir``.
        record: Whether to write ``routing.npz`` too: rows of every interval, and which experts were
            chosen together, for ``plan --from``. The default is not to.
        every_n_batches: Batches of an interval of predict, after which loggers get the balance. An
            interval of fit is the trainer's ``log_every_n_steps`` batches.
        picture: Whether to draw the picture. The default is to.

    Attributes:
        summary: After a run, the counts of all ranks and what they say.
    """

    def __init__(
        self,
        output_dir: str | None = None,
        *,
        record: bool = False,
        every_n_batches: int = 50,
        picture: bool = True,
    ) -> None:
        if every_n_batches < 1:
            raise UsageError(f"every_n_batches={every_n_batches}, but it must be 1 or more.")
        self.output_dir = output_dir
        self.record = record
        self.every_n_batches = every_n_batches
        self.picture = picture
        self.summary: RoutingSummary | None = None
        self._log: RoutingLog | None = None
        self._counts: RoutingCounts | None = None
        self._num_pauses = 0
        self._is_to_be_shown = False

    # Predict.

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Ranks may have different numbers of batches: they come together at the end only.
        is_alone = trainer.world_size == 1
        self._end_batch(trainer, batch_idx + 1, self.every_n_batches, logs=is_alone)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    # Fit.

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        every = cast(Any, trainer).log_every_n_steps or self.every_n_batches
        self._end_batch(trainer, batch_idx + 1, every, logs=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._num_pauses += 1  # activation checkpointing repeats forwards

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._num_pauses -= 1

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._num_pauses += 1

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._num_pauses -= 1

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()  # other ranks may be gone: nothing is brought together, and no file written

    # Both.

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(Any, pl_module)
        if not isinstance(getattr(module, "routing_log", None), RoutingLog):
            raise UsageError(
                f"RoutingBalance counts the experts of a MoELightningModule, and "
                f"{type(pl_module).__name__} is none. Leave the callback out."
            )
        self.summary, self._num_pauses = None, 0
        # Every layer on every rank, for they are added up; a pipeline stage has some of them.
        holders = module.hosted.num_holders()
        self._counts = RoutingCounts(
            {layer: len(of_layer) for layer, of_layer in holders.items()},
            device=trainer.strategy.root_device,
            num_ranks=trainer.world_size,
            with_pairs=self.record,
        )
        self._log = module.routing_log
        module.routing_log.subscribe(self._add, wants_times=False)

    def _add(self, trace: LayerTrace) -> None:
        if self._num_pauses == 0 and self._counts is not None:
            self._counts.add(trace)

    def _end_batch(self, trainer: Trainer, num_batches: int, every: int, *, logs: bool) -> None:
        assert self._counts is not None, "the run has started"
        if num_batches % every:
            self._counts.count()
            return
        self._counts.end_interval()
        if logs and trainer.loggers:
            loads = self._counts.last_interval(_reducer(trainer))
            step = trainer.global_step if trainer.training else num_batches
            self._log_balance(trainer, RoutingSummary.of(loads), step)

    def _log_balance(self, trainer: Trainer, summary: RoutingSummary, step: int) -> None:
        values = summary.scalars(per_layer=len(summary.layers) <= LAYERS_LOGGED)
        for logger in trainer.loggers:
            logger.log_metrics(values, step)

    def _finish(self, trainer: Trainer) -> None:
        counts = self._counts
        self._stop()
        assert counts is not None, "the run has started"
        intervals = counts.finish(_reducer(trainer))
        loads = {layer: rows_IE.sum(0) for layer, rows_IE in intervals.items()}
        self.summary = RoutingSummary.of(loads, counts.slots, counts.slot_rows())
        if not trainer.is_global_zero:
            return
        self._log_balance(trainer, self.summary, trainer.global_step)
        directory = Path(self.output_dir or trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "routing_balance.json", self.summary.to_json())
        if self.record:
            recording = Recording(_as_arrays(intervals), _as_arrays(counts.pairs()))
            save_recording(directory / "routing.npz", recording)
        self._is_to_be_shown = True

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._is_to_be_shown or self.summary is None:
            return
        self._is_to_be_shown = False
        # Now, when the progress bar and the clock of the run have ended.
        if self.picture:
            directory = Path(self.output_dir or trainer.default_root_dir)
            draw_routing(directory / "routing_balance.png", self.summary)
        print(self.summary.table(), file=sys.stderr)

    def _stop(self) -> None:
        if self._log is not None:
            self._log.unsubscribe(self._add)
        self._log = self._counts = None


def _reducer(trainer: Trainer) -> Any:
    def reduce(tensor: Tensor, operation: Literal["sum", "max"]) -> Tensor:
        return torch.as_tensor(trainer.strategy.reduce(tensor, reduce_op=operation))

    return reduce


def _as_arrays(tensors: dict[int, Tensor]) -> dict[int, np.ndarray[Any, np.dtype[np.int64]]]:
    return {layer: tensor.numpy() for layer, tensor in tensors.items()}
