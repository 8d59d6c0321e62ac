"""What decides the answers of a predict run, whoever computes them."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

import moe_lightning
from moe_lightning.modeling.manifest import training_checkpoint_hash

VERSIONS = ("torch", "transformers", "tokenizers")


def identity_of_run(
    trainer: Trainer, module: LightningModule, datamodule: Any, ckpt_path: str | None
) -> dict[str, Any]:
    """By what a job is known again; reads the whole input.

    Args:
        trainer: The trainer.
        module: The model; one of ours says what of it matters.
        datamodule: The planned input.
        ckpt_path: The training checkpoint that the weights are from, if any.

    Returns:
        Plain values.
    """
    model: Any = module
    identity = {
        "data": datamodule.identity(),
        **(model.identity() if hasattr(model, "identity") else {}),
        "ckpt_path": None if ckpt_path is None else training_checkpoint_hash(Path(ckpt_path)),
        "trainer": {"precision": trainer.precision},
        "versions": {
            "moe_lightning": moe_lightning.__version__,
            **{name: importlib.metadata.version(name) for name in VERSIONS},
        },
    }
    # What is no plain value, such as an attribute of somebody's own task, is known by its text.
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain
