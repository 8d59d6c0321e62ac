"""Watching: the callback that makes a predict run leave what verify compares."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from moe_lightning.errors import UsageError
from moe_lightning.modeling.precision import computing_dtype
from moe_lightning.strategies import MoEStrategy
from moe_lightning.verification.capture import Capture
from moe_lightning.verification.tolerances import lossy_wires

PARTS = "verify.parts"


@dataclass(frozen=True, slots=True)
class Configured:
    """What was configured, as verify has to know it once the model is gone.

    Attributes:
        strategy: Name of the strategy.
        world_size: Ranks.
        weights_dtype: Precision of the weights.
        dtype: Precision of the computation.
        experts_backend: How experts were computed.
        wires: Precisions of rows on their way, where lossy.
        report: What the strategy says of itself.
        slots_of: The slots of each expert of each layer; empty if there is one slot.
    """

    strategy: str
    world_size: int
    weights_dtype: torch.dtype
    dtype: torch.dtype
    experts_backend: str
    wires: tuple[str, ...]
    report: Mapping[str, Any]
    slots_of: Mapping[int, tuple[tuple[int, ...], ...]]


class Watching(Callback):
    """Makes room for what a run captures, and notes what was configured.

    Args:
        capture: Who looks on.

    Attributes:
        configured: What was configured, after the run; None if there were no rows.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.configured: Configured | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        # Ranks of a tensor-parallel group have the same rows and layers; stages of a pipeline have
        # the same rows and layers of their own.
        num_copies = getattr(getattr(strategy, "sizes", None), "tp", 1)
        self.capture.is_writer = num_copies == 1 or bool(getattr(strategy, "writes_rows", True))
        if trainer.is_global_zero:
            parent = self.capture.parent
            shutil.rmtree(parent, ignore_errors=True)
            try:
                parent.mkdir(parents=True)
            except OSError as error:
                raise UsageError(
                    f"--output_dir {parent.parent}: cannot write there ({error.strerror}). Choose "
                    "another directory."
                ) from error
        strategy.barrier("verify parts")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.strategy.barrier("verify parts written")
        self.configured = _describe(trainer, pl_module)


def parts_folder(output_dir: str | Path) -> Path:
    """Where captured rows wait."""
    return Path(output_dir) / PARTS


def _describe(trainer: Trainer, module: Any) -> Configured | None:
    if module.hosted is None:
        return None
    strategy = trainer.strategy
    placement = module.hosted.placement
    weights_dtype = module.model.dtype
    return Configured(
        strategy=getattr(strategy, "strategy_name", type(strategy).__name__),
        world_size=trainer.world_size,
        weights_dtype=weights_dtype,
        dtype=computing_dtype(trainer.precision, weights_dtype),
        experts_backend=module.experts_backend,
        wires=lossy_wires(strategy),
        report=strategy.report() if isinstance(strategy, MoEStrategy) else {},
        slots_of={} if placement is None else placement.slots,
    )
