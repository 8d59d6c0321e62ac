"""What a training checkpoint of fit is."""

import torch

from moe_lightning.errors import CheckpointError


def check_training_checkpoint(path: str) -> None:
    """Refuse a file that Lightning did not write, before anything is loaded.

    Raises:
        CheckpointError: If it is none.
    """
    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        found = {"state_dict", "pytorch-lightning_version"} - content.keys()
    except Exception as error:  # whatever the unpickler raises
        raise CheckpointError(
            f"--ckpt_path {path} is no training checkpoint of fit ({type(error).__name__}: "
            f"{error})."
        ) from error
    if found:
        raise CheckpointError(f"--ckpt_path {path} is no training checkpoint of fit.")
