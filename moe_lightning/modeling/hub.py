"""A checkpoint from the Hugging Face hub, of which only the files that are used are downloaded."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from moe_lightning.errors import CheckpointError

# No pickles, no code, no other frameworks' copies of the weights.
_SMALL_FILES = ["*.json", "*.model", "*.tiktoken", "*.jinja", "vocab.txt", "merges.txt"]
_IGNORED_FILES = ["*/*", "consolidated*"]


def download_checkpoint(name: str) -> Path:
    """Download a checkpoint, or find it in the hub's cache.

    Args:
        name: The hub id, ``owner/name``.

    Returns:
        The directory that holds the files.

    Raises:
        CheckpointError: If the name is no hub id, does not exist there, is gated, or cannot be
            reached.
    """
    path = Path(name).expanduser()
    if os.path.exists(path):
        raise CheckpointError(
            f"{path}: is a file. Name the directory that holds config.json and *.safetensors."
        )
    if name != name.strip() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"{name!r}: there is no such directory, and it is no hub id (owner/name) either. Check "
            "--model.checkpoint; `demo` is the checkpoint that ships with the package."
        )
    try:
        # The weights in a second step: a wrong name or a missing config must not cost the download
        # of the weights.
        folder = snapshot_download(
            name, allow_patterns=_SMALL_FILES, ignore_patterns=_IGNORED_FILES
        )
        if not (Path(folder) / "config.json").is_file():
            raise CheckpointError(
                f"{name!r} on the hub has no config.json. Name a transformers model."
            )
        return Path(
            snapshot_download(
                name,
                allow_patterns=[*_SMALL_FILES, "*.safetensors"],
                ignore_patterns=_IGNORED_FILES,
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name!r}: the model is gated. Accept its terms on https://huggingface.co/{name}, "
            "then `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{name!r}: there is no such directory here, nor a model of that name on the hub. "
            "Check --model.checkpoint; a private model needs `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name!r}: there is no such directory, it is not in the cache, and the hub cannot be "
            "reached. Check the path or the network, or download it elsewhere and name its "
            "directory."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{name!r}: the download failed: {error}. Run the same command again; it goes on "
            "where it stopped."
        ) from error
