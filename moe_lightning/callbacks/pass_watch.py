"""PassWatch: what callbacks share that look at every pass of every MoE layer.

    start ──▶ see(trace) ... end_batch ... ──▶ finish (all ranks) ──▶ show (the first rank)

Seen are the passes of predict, and in fit those forwards that are trained on: not those that
activation checkpointing repeats in backward, nor those of validation.
"""

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from moe_lightning.dispatch import LayerTrace, RoutingLog
from moe_lightning.errors import UsageError


class PassWatch(Callback):
    """Subscribes to the passes of a MoELightningModule for the time of a run.

    Args:
        output_dir: Where files go. The default is the trainer's ``default_root_dir``.
        every_n_batches: Batches of an interval of predict; one of fit is the trainer's
            ``log_every_n_steps``.
    """

    wants_times: ClassVar[bool]

    def __init__(self, output_dir: str | None, *, every_n_batches: int) -> None:
        if every_n_batches < 1:
            raise UsageError(f"every_n_batches={every_n_batches}, but it must be 1 or more.")
        self.output_dir = output_dir
        self.every_n_batches = every_n_batches
        self._log: RoutingLog | None = None
        self._num_pauses = 0
        self._is_to_be_shown = False

    @abstractmethod
    def start(self, trainer: Trainer, module: Any) -> None:
        """Begin anew."""

    @abstractmethod
    def see(self, trace: LayerTrace) -> None:
        """Take a pass; called in its thread."""

    @abstractmethod
    def end_batch(self, trainer: Trainer, num_batches: int, *, ends_interval: bool) -> None:
        """A batch is over; ``num_batches`` of this epoch are."""

    @abstractmethod
    def finish(self, trainer: Trainer) -> None:
        """Bring together what all ranks have seen; all of them call this. Writes numbers."""

    @abstractmethod
    def show(self, directory: Path) -> None:
        """Draw and print, on the first rank, when progress bars and clocks have stopped."""

    def stop(self) -> None:
        """Undo what the start did, good or bad; called once or more."""
        if self._log is not None:
            self._log.unsubscribe(self._see)
        self._log = None

    def directory(self, trainer: Trainer) -> Path:
        """Where files go; it is there."""
        directory = Path(self.output_dir or trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def tell_loggers(self, trainer: Trainer, values: dict[str, float], step: int) -> None:
        """Give numbers to every logger."""
        for logger in trainer.loggers:
            logger.log_metrics(values, step)

    # Lightning's hooks.

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
        number = batch_idx + 1
        self.end_batch(trainer, number, ends_interval=number % self.every_n_batches == 0)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

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
        number = batch_idx + 1
        every = cast(Any, trainer).log_every_n_steps or self.every_n_batches
        self.end_batch(trainer, number, ends_interval=number % every == 0)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._num_pauses += 1

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
        self.stop()  # other ranks may be gone: nothing is brought together, and no file written

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.stop()
        if self._is_to_be_shown:
            self._is_to_be_shown = False
            self.show(self.directory(trainer))

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log = getattr(pl_module, "routing_log", None)
        if not isinstance(log, RoutingLog):
            name = type(self).__name__
            raise UsageError(
                f"{name} watches the experts of a MoELightningModule, and "
                f"{type(pl_module).__name__} is none. Leave the callback out."
            )
        self._num_pauses, self._is_to_be_shown = 0, False
        self.start(trainer, pl_module)
        self._log = log
        log.subscribe(self._see, wants_times=self.wants_times)

    def _see(self, trace: LayerTrace) -> None:
        if self._num_pauses == 0:
            self.see(trace)

    def _finish(self, trainer: Trainer) -> None:
        self.stop()
        self.finish(trainer)
        self._is_to_be_shown = trainer.is_global_zero
