"""What ships so that every command runs as it is: a small trained checkpoint, and prompts for it.

The checkpoint's model card (``checkpoint/README.md``) says how it was made and how good it is.
"""

from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent


def checkpoint_path() -> Path:
    """Directory of the demo checkpoint."""
    return HERE / "checkpoint"


def prompts_path() -> Path:
    """File of the demo prompts: plays, verse and prose."""
    return HERE / "prompts.jsonl"


def finetune_path(part: Literal["train", "val"]) -> Path:
    """File of the fine-tuning sample: documents that the demo checkpoint was not trained on."""
    return HERE / f"finetune_{part}.jsonl"
