"""SaveCheckpoints: Lightning's ModelCheckpoint with the few options that fit needs."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from typing_extensions import override


class SaveCheckpoints(ModelCheckpoint):
    """Saves training checkpoints under ``checkpoints/``; ``last.ckpt`` is the newest.

    Args:
        output_dir: The directory of the run.
        every_n_train_steps: Steps between checkpoints. The default is one after every validation,
            or after every epoch where there is no validation.
        save_top_k: How many checkpoints to keep beside the last one; -1 keeps all.
    """

    def __init__(
        self, output_dir: str, every_n_train_steps: int | None = None, save_top_k: int = 1
    ) -> None:
        super().__init__(
            dirpath=Path(output_dir) / "checkpoints",
            filename="{step}",
            save_last=True,
            save_top_k=save_top_k,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    @override
    def _save_last_checkpoint(
        self, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        # Lightning 2.6.6 forgets the dev run at the end of training.
        if not getattr(trainer, "fast_dev_run", False):
            super()._save_last_checkpoint(trainer, monitor_candidates)
