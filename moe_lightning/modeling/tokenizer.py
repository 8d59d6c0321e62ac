"""The tokenizer of a checkpoint."""

import hashlib
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


def tokenizer_hash(view: CheckpointView) -> str:
    """A hash of the files that decide how texts become tokens, and tokens texts.

    Args:
        view: The opened checkpoint.

    Returns:
        SHA-256 in hex of the directory's files that are no weights: vocabulary, chat template and
        configs, that of generation too.
    """
    digest = hashlib.sha256()
    for file in sorted(view.path.iterdir()):
        if file.suffix in _SMALL_FILES and file.is_file():
            content = file.read_bytes()
            digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


_SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
