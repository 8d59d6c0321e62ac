"""From a model to a Hugging Face directory; transformers reverses its own weight conversions."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_lightning.errors import UsageError
from moe_lightning.modeling.quiet import quiet_transformers


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Write a model and its tokenizer.

    Args:
        model: The model, all of it on this process.
        tokenizer: Its tokenizer.
        directory: Where to; made if missing.

    Raises:
        UsageError: If the directory holds a checkpoint already, or cannot be made.
    """
    if (directory / "config.json").exists():
        raise UsageError(
            f"{directory} holds a checkpoint already. Choose another directory, or remove it."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{directory} cannot be made ({error.strerror}).") from error
    with quiet_transformers():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
