"""ReadsShards: lets strategies that keep whole models start from checkpoints that ranks wrote."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from moe_lightning.errors import UsageError
from moe_lightning.modeling.training_checkpoint import find_sharded
from moe_lightning.strategies.hosting import HostedModel
from moe_lightning.strategies.sharded_checkpoint import load_sharded


class ReadsShards(TorchCheckpointIO):
    """Lightning's own checkpoint files, and directories of shards for inference.

    Args:
        module: The LightningModule.
        hosted: Its model, whole.
    """

    def __init__(self, module: L.LightningModule, hosted: HostedModel) -> None:
        self._module = module
        self._hosted = hosted

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if find_sharded(Path(path)) is None:
            content: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
            return content
        if self._module.trainer.training:
            raise UsageError(
                f"--ckpt_path {path} was saved by ranks. Go on with it by --trainer.strategy "
                "moe_fsdp, on any number of ranks (--trainer.devices 1 is one)."
            )
        self._hosted.make_room()
        rest = load_sharded(Path(path), self._hosted.model, rows=self._hosted.rows)
        # The weights are in the model already; Lightning copies them onto themselves.
        return rest | {"state_dict": self._module.state_dict()}
