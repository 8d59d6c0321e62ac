"""PlacementFile: writes where the experts of a run were."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class PlacementFile(Callback):
    """Writes ``placement.json`` of a predict run, to be used again with the policy ``file``.

    Args:
        output_dir: Where it goes. The default is the trainer's ``default_root_dir``.
    """

    def __init__(self, output_dir: str | None = None) -> None:
        self.output_dir = output_dir

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        placement = getattr(getattr(pl_module, "hosted", None), "placement", None)
        if placement is not None and trainer.is_global_zero:
            directory = Path(self.output_dir or trainer.default_root_dir)
            directory.mkdir(parents=True, exist_ok=True)
            placement.save(directory / "placement.json")
