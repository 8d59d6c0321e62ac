"""What a training checkpoint of fit is: Lightning's single file, or a directory of shards.

    X.ckpt/
        __0_0.distcp ...  tensors, as ranks wrote them; names as in ``sharded_state``
        .metadata         where each is
        meta.pt           the rest of Lightning's checkpoint, optimizer groups, random states
        complete.json     written last: a directory without it is not a checkpoint

A directory gets its name once it is complete. While an older one makes way, ``X.ckpt.tmp-<id>`` and
``X.ckpt.old-<id>`` are complete ones too, and are found here. Private names of torch used here, as
of 2.13: the classes that ``.metadata`` consists of.
"""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from typing_extensions import override

from moe_lightning.errors import CheckpointError

FORMAT = 1
META_FILE, MARKER_FILE = "meta.pt", "complete.json"
_DCP = "torch.distributed.checkpoint."
_SAFE = {
    "torch": ("Size", *(n for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype))),
    "torch.serialization": ("_get_layout",),
    **dict.fromkeys(("pathlib", "pathlib._local"), ("PosixPath", "WindowsPath")),
    f"{_DCP}filesystem": ("_StorageInfo",),
    f"{_DCP}metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
}


def check_training_checkpoint(path: str) -> None:
    """Refuse what fit did not write, before anything is loaded.

    Args:
        path: A file, or a directory of shards.

    Raises:
        CheckpointError: If it is none.
    """
    directory = find_sharded(Path(path))
    if directory is not None:
        read_tensors(directory)
        return
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


def find_sharded(path: Path) -> Path | None:
    """Find the directory of shards that a path names.

    Args:
        path: What the user gave.

    Returns:
        The directory, which may have another name if a save was killed while it replaced this one;
        None if the path is a file or nothing.

    Raises:
        CheckpointError: If there is such a directory, but none that is complete.
    """
    if path.is_file():
        return None
    if is_complete(path):
        return path
    # A save is complete before the older one makes way, so either of these may be all there is.
    for kind in ("tmp", "old"):
        found = [p for p in leftovers(path) if f".{kind}-" in p.name and is_complete(p)]
        if found:
            return max(found, key=lambda p: (p / MARKER_FILE).stat().st_mtime_ns)
    if path.is_dir():
        raise CheckpointError(
            f"{path} is not a complete training checkpoint: it has no {MARKER_FILE}, which a save "
            "writes last. Give an earlier checkpoint of the run."
        )
    return None


def is_complete(directory: Path) -> bool:
    """Whether a save into a directory came to its end."""
    return (directory / MARKER_FILE).is_file()


def leftovers(path: Path) -> list[Path]:
    """What saves of a checkpoint that were killed left beside it."""
    if not path.parent.is_dir():
        return []
    starts = (f"{path.name}.tmp-", f"{path.name}.old-")
    return sorted(p for p in path.parent.iterdir() if p.name.startswith(starts))


class SafeReader(FileSystemReader):
    """torch's reader of shards, that never runs what a file says.

    Args:
        path: The directory.
    """

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except CheckpointError:
            raise
        except Exception as error:  # whatever the unpickler raises
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}: {error}). Copy the checkpoint "
                "again, or give an earlier one."
            ) from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path} is not the metadata of a training checkpoint.")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if name not in _SAFE.get(module, ()):
            raise CheckpointError(
                f".metadata of the checkpoint refers to {module}.{name}, which has no place in "
                "there. Do not use this checkpoint: it was made by something else than fit."
            )
        return super().find_class(module, name)


def read_tensors(directory: Path) -> dict[str, TensorStorageMetadata]:
    """Read which tensors a directory of shards has, and check that their files are there.

    Args:
        directory: The directory.

    Returns:
        Size and dtype of each tensor, by name.

    Raises:
        CheckpointError: If the directory is damaged.
    """
    metadata = SafeReader(directory).read_metadata()
    ends: dict[str, int] = {}
    for place in (metadata.storage_data or {}).values():
        ends[place.relative_path] = max(
            ends.get(place.relative_path, 0), place.offset + place.length
        )
    for name, end in ends.items():
        file = directory / name
        if not file.is_file() or os.path.getsize(file) < end:
            raise CheckpointError(
                f"{file} is missing or truncated. Copy the checkpoint again (ranks on several "
                "machines need a directory that all of them share), or give an earlier one."
            )
    tensors = metadata.state_dict_metadata
    return {name: t for name, t in tensors.items() if isinstance(t, TensorStorageMetadata)}


def read_meta(directory: Path) -> dict[str, Any]:
    """Read what a directory of shards holds beside tensors.

    Args:
        directory: The directory.

    Returns:
        As it was saved.

    Raises:
        CheckpointError: If it cannot be read, or is of a later format.
    """
    try:
        marker = json.loads((directory / MARKER_FILE).read_text())
        if marker["format"] != FORMAT:
            raise CheckpointError(
                f"{directory} is of format {marker['format']}; this version of moe_lightning reads "
                f"{FORMAT}. Update it."
            )
        content = torch.load(directory / META_FILE, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever the unpickler raises
        raise CheckpointError(
            f"{directory / META_FILE} cannot be read ({type(error).__name__}: {error}). Copy the "
            "checkpoint again, or give an earlier one."
        ) from error
    assert isinstance(content, dict), "it is written as one"
    return content
