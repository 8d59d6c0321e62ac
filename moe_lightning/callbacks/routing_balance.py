"""RoutingBalance: how many rows each expert got."""

import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from moe_lightning.callbacks.pass_watch import PassWatch
from moe_lightning.callbacks.routing_counts import RoutingCounts
from moe_lightning.callbacks.routing_picture import draw_routing
from moe_lightning.callbacks.routing_summary import RoutingSummary
from moe_lightning.dispatch import LayerTrace
from moe_lightning.files import write_atomically
from moe_lightning.placement.recording import Recording, save_recording

LAYERS_LOGGED = 64


class RoutingBalance(PassWatch):
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

    wants_times: ClassVar[bool] = False

    def __init__(
        self,
        output_dir: str | None = None,
        *,
        record: bool = False,
        every_n_batches: int = 50,
        picture: bool = True,
    ) -> None:
        super().__init__(output_dir, every_n_batches=every_n_batches)
        self.record = record
        self.picture = picture
        self.summary: RoutingSummary | None = None
        self._counts: RoutingCounts | None = None

    @override
    def start(self, trainer: Trainer, module: Any) -> None:
        self.summary = None
        # Every layer on every rank, for they are added up; a pipeline stage has some of them.
        holders = module.hosted.num_holders()
        self._counts = RoutingCounts(
            {layer: len(of_layer) for layer, of_layer in holders.items()},
            device=trainer.strategy.root_device,
            num_ranks=trainer.world_size,
            with_pairs=self.record,
        )

    @override
    def see(self, trace: LayerTrace) -> None:
        assert self._counts is not None, "the run has started"
        self._counts.add(trace)

    @override
    def end_batch(self, trainer: Trainer, num_batches: int, *, ends_interval: bool) -> None:
        assert self._counts is not None, "the run has started"
        if not ends_interval:
            self._counts.count()
            return
        self._counts.end_interval()
        # In predict, ranks may have different numbers of batches: they meet at the end only.
        if trainer.loggers and (trainer.training or trainer.world_size == 1):
            loads = self._counts.last_interval(_reducer(trainer))
            step = trainer.global_step if trainer.training else num_batches
            self._log_balance(trainer, RoutingSummary.of(loads), step)

    @override
    def finish(self, trainer: Trainer) -> None:
        counts, self._counts = self._counts, None
        assert counts is not None, "the run has started"
        intervals = counts.finish(_reducer(trainer))
        loads = {layer: rows_IE.sum(0) for layer, rows_IE in intervals.items()}
        self.summary = RoutingSummary.of(loads, counts.slots, counts.slot_rows())
        if not trainer.is_global_zero:
            return
        self._log_balance(trainer, self.summary, trainer.global_step)
        directory = self.directory(trainer)
        write_atomically(directory / "routing_balance.json", self.summary.to_json())
        if self.record:
            recording = Recording(_as_arrays(intervals), _as_arrays(counts.pairs()))
            save_recording(directory / "routing.npz", recording)

    @override
    def show(self, directory: Path) -> None:
        assert self.summary is not None, "the run has finished"
        if self.picture:
            draw_routing(directory / "routing_balance.png", self.summary)
        print(self.summary.table(), file=sys.stderr)

    def _log_balance(self, trainer: Trainer, summary: RoutingSummary, step: int) -> None:
        values = summary.scalars(per_layer=len(summary.layers) <= LAYERS_LOGGED)
        self.tell_loggers(trainer, values, step)


def _reducer(trainer: Trainer) -> Any:
    def reduce(tensor: Tensor, operation: Literal["sum", "max"]) -> Tensor:
        return torch.as_tensor(trainer.strategy.reduce(tensor, reduce_op=operation))

    return reduce


def _as_arrays(tensors: dict[int, Tensor]) -> dict[int, np.ndarray[Any, np.dtype[np.int64]]]:
    return {layer: tensor.numpy() for layer, tensor in tensors.items()}
