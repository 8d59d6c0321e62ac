"""The directory of a checkpoint over ranks, from its first file to its last rename, and its end.

    X.ckpt.tmp-<id> ──▶ complete.json ──▶ X.ckpt becomes .old-<id> ──▶ tmp X.ckpt ──▶ old removed

A process that is killed anywhere in this leaves a directory that ``find_sharded`` finds. One
process calls these functions.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch

from moe_lightning.errors import CheckpointError
from moe_lightning.files import atomic_writer, write_atomically
from moe_lightning.modeling.training_checkpoint import (
    FORMAT,
    MARKER_FILE,
    META_FILE,
    find_sharded,
    is_complete,
    leftovers,
    read_tensors,
)


def remove_checkpoint(path: Path) -> None:
    """Remove a training checkpoint of either kind, if it is there; one process calls this.

    Args:
        path: A file or directory.
    """
    for found in (path, *leftovers(path)):
        if found.is_dir() and not found.is_symlink():
            # No longer a checkpoint before it is half of one.
            (found / MARKER_FILE).unlink(missing_ok=True)
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)


def begin(path: Path) -> Path:
    """Make the directory that a save writes into; what killed saves left is removed.

    Args:
        path: The checkpoint to be.

    Returns:
        The directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_complete(path):
        complete = _find_or_none(path)
        if complete is not None:  # of a save that was killed between its last two steps
            _put_in_place(complete, path)
    for leftover in leftovers(path):
        remove_checkpoint(leftover)
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    return temporary


def _find_or_none(path: Path) -> Path | None:
    """As ``find_sharded``, and None too if there is only an incomplete directory."""
    try:
        return find_sharded(path)
    except CheckpointError:
        return None


def finish(temporary: Path, path: Path, meta: dict[str, Any]) -> None:
    """Make what all ranks have written a checkpoint.

    Args:
        temporary: The directory of :func:`begin`.
        path: The checkpoint to be; one that is there is replaced.
        meta: What is saved beside tensors.
    """
    read_tensors(temporary)  # all ranks wrote into this very directory
    with atomic_writer(temporary / META_FILE) as file:
        torch.save(meta, file)
    write_atomically(temporary / MARKER_FILE, json.dumps({"format": FORMAT}) + "\n")
    _sync(temporary)
    _put_in_place(temporary, path)


def _put_in_place(complete: Path, path: Path) -> None:
    """Give a complete directory its name. At every moment one that is complete can be found."""
    old = path.with_name(f"{path.name}.old-{uuid.uuid4().hex[:8]}")
    if os.path.lexists(path):
        os.rename(path, old)
    os.rename(complete, path)
    _sync(path.parent)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
