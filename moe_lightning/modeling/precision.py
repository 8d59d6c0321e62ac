"""Which dtype a model is loaded in."""

from typing import Literal

import torch
from transformers import PreTrainedConfig

from moe_lightning.errors import UsageError

TRUE_PRECISIONS: dict[str, "DtypeName"] = {"bf16-true": "bfloat16", "16-true": "float16"}
MIXED_PRECISIONS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def computing_dtype(precision: object, weights_dtype: torch.dtype) -> torch.dtype:
    """The dtype that matrix products are computed in.

    Args:
        precision: The trainer's precision; ``bf16-mixed`` and ``16-mixed`` cast for each product.
        weights_dtype: Dtype of the weights.
    """
    return MIXED_PRECISIONS.get(str(precision), weights_dtype)


def choose_dtype(
    name: DtypeName,
    device: torch.device,
    config: PreTrainedConfig,
    *,
    is_training: bool,
    precision: str,
) -> torch.dtype:
    """The dtype of a name.

    Args:
        name: The dtype, or ``auto``: float32 on a CPU and for training, and otherwise the
            checkpoint's own.
        device: Where the model goes.
        config: The checkpoint's config.
        is_training: Whether it is going to be trained.
        precision: The trainer's precision; ``bf16-true`` and ``16-true`` name a dtype too.

    Returns:
        The dtype of the weights.

    Raises:
        UsageError: If the trainer's precision names another dtype.
    """
    wanted = TRUE_PRECISIONS.get(precision)
    if wanted is not None and name in ("auto", wanted):
        name = wanted
    elif wanted is not None or precision == "64-true":
        raise UsageError(
            f"--trainer.precision {precision} does not go with --model.dtype {name}, which decides "
            "about the weights. Leave the precision out."
        )
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu" or is_training:
        return torch.float32
    return getattr(config.get_text_config(), "dtype", None) or torch.float32
