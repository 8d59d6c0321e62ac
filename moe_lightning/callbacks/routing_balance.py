"""RoutingBalance: how many rows each expert got."""

from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from moe_lightning.dispatch import LayerTrace, RoutingLog
from moe_lightning.errors import UsageError
from moe_lightning.placement import save_loads


class RoutingBalance(Callback):
    """Counts the rows of every expert of a predict run and writes ``routing_balance.json``.

    The file is what the placement policy ``balanced`` reads. Padding is not counted.

    Args:
        output_dir: Where the file goes. The default is the trainer's ``default_root_dir``.

    Attributes:
        counts: For each MoE layer, rows per expert, ``[E]`` int64, of this rank.
    """

    def __init__(self, output_dir: str | None = None) -> None:
        self.output_dir = output_dir
        self.counts: dict[int, Tensor] = {}
        self._log: RoutingLog | None = None

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(Any, pl_module)
        if not isinstance(getattr(module, "routing_log", None), RoutingLog):
            raise UsageError(
                f"RoutingBalance counts the experts of a MoELightningModule, and "
                f"{type(pl_module).__name__} is none. Leave the callback out."
            )
        self.counts = {}
        # Every layer on every rank, for they are added up; a pipeline stage has some of them.
        for layer, holders in module.hosted.num_holders().items():
            self.counts[layer] = torch.zeros(
                len(holders), dtype=torch.int64, device=trainer.strategy.root_device
            )
        self._log = module.routing_log
        module.routing_log.subscribe(self._count)

    def _count(self, trace: LayerTrace) -> None:
        # Stays on the device: nothing is read before the end.
        index_N = trace.index_TK.reshape(-1)
        self.counts[trace.layer].scatter_add_(0, index_N, torch.ones_like(index_N))

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        loads = {
            layer: torch.as_tensor(trainer.strategy.reduce(counts_E, reduce_op="sum")).tolist()
            for layer, counts_E in self.counts.items()
        }
        if trainer.is_global_zero:
            directory = Path(self.output_dir or trainer.default_root_dir)
            directory.mkdir(parents=True, exist_ok=True)
            save_loads(directory / "routing_balance.json", loads)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._log is not None:
            self._log.unsubscribe(self._count)
            self._log = None
