"""CheckpointsOfRanks: the part of a Lightning strategy that saves and loads a model over ranks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from moe_lightning.collectives import RankGroup
from moe_lightning.errors import CheckpointError, UsageError
from moe_lightning.modeling.training_checkpoint import find_sharded
from moe_lightning.strategies.checkpoint_directories import remove_checkpoint
from moe_lightning.strategies.hosting import HostedModel
from moe_lightning.strategies.sharded_checkpoint import load_sharded, save_sharded
from moe_lightning.strategies.single_file import load_single_file


class CheckpointsOfRanks(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with this package's checkpoints; for a strategy to be.

    Attributes:
        host_ranks: All ranks, on a group of the host's.
    """

    host_ranks: RankGroup

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # save_checkpoint takes tensors from the model, and gathers nothing

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        return {}

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise UsageError("storage_options are not supported: ranks write files themselves.")
        hosted = self._hosted_model()
        hosted.unpack()
        rest = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        save_sharded(
            Path(self.broadcast(filepath)),
            hosted.model,
            optimizer=self._optimizer() if "optimizer_states" in checkpoint else None,
            rows=hosted.rows,
            rest=rest,
            ranks=self.host_ranks,
            # The base of adapters is the checkpoint's, and stays there.
            only_trainable=getattr(self.lightning_module, "lora", None) is not None,
        )

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        hosted = self._hosted_model()
        hosted.make_room()
        optimizer = self._optimizer()
        if find_sharded(path) is not None:
            rest = load_sharded(
                path, hosted.model, optimizer=optimizer, rows=hosted.rows, ranks=self.host_ranks
            )
        elif path.is_file():
            rest = load_single_file(path, hosted.model, optimizer=optimizer, rows=hosted.rows)
        else:
            raise CheckpointError(f"--ckpt_path {path}: there is no such file or directory.")
        return {**rest, "state_dict": {}}

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        pass  # load_checkpoint did

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        pass  # load_checkpoint did

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return False

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            remove_checkpoint(Path(filepath))

    def _hosted_model(self) -> HostedModel:
        hosted = getattr(self.lightning_module, "hosted", None)
        assert isinstance(hosted, HostedModel), "configure_model has not run"
        return hosted

    def _optimizer(self) -> Optimizer | None:
        if not self.optimizers:
            return None
        assert len(self.optimizers) == 1, "MoELightningModule has one"
        optimizer = self.optimizers[0]
        return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
