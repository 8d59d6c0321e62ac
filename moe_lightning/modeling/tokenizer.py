"""The tokenizer of a checkpoint."""

from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe_lightning.errors import CheckpointError
from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.preflight import check_tokenizer


def load_tokenizer(view: CheckpointView) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Args:
        view: The opened checkpoint.

    Returns:
        The tokenizer.

    Raises:
        CheckpointError: If its files are missing or cannot be read.
    """
    check_tokenizer(view.path)
    try:
        return cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(view.path, trust_remote_code=False),
        )
    except Exception as error:
        raise CheckpointError(
            f"{view.path}: the tokenizer cannot be loaded ({error}). Copy tokenizer.json and "
            "tokenizer_config.json "
            "from the checkpoint's source."
        ) from error
