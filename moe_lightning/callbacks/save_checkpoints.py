"""SaveCheckpoints: Lightning's ModelCheckpoint with the few options that fit needs."""

from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint


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
