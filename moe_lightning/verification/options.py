"""What a user says about the reference."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ReferenceOptions:
    """The model that verify compares with: unmodified transformers in one process.

    Args:
        checkpoint: Its checkpoint. The default is --model.checkpoint; another one tells whether two
            checkpoints are the same model, a converted copy and its source for example.
        device: Where it computes, such as cpu or cuda:0.
        dtype: Precision that it computes in. Its weights are rounded to the configured precision
            before, so that rounding them is no difference.
    """

    checkpoint: str | None = None
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
