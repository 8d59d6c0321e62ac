"""Is another machine's copy of a checkpoint the same as ours? A hash that reads a little of every
file."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.file_reading import open_regular, read_exactly
from moe_lightning.modeling.training_checkpoint import find_sharded

SAMPLES = 16
SAMPLE_BYTES = 64 * 2**10


def manifest_hash(view: CheckpointView) -> str:
    """Hash a checkpoint's config, headers and samples of its weights.

    Two trainings of one model have the same headers, so 16 blocks of 64 KiB of each file, evenly
    spread, are read as well; files up to 1 MiB whole. Copies that differ in a few experts only may
    still have the same hash.

    Args:
        view: The opened checkpoint.

    Returns:
        SHA-256 in hex.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    digest = hashlib.sha256(view.fingerprint().encode())
    for file in sorted({info.file for info in view.tensors.values()}, key=lambda file: file.name):
        for sample in _samples(file):
            digest.update(sample)
    return digest.hexdigest()


def training_checkpoint_hash(path: Path) -> str:
    """Hash samples of a training checkpoint of fit.

    Args:
        path: A file, or a directory of shards.

    Returns:
        SHA-256 in hex.
    """
    directory = find_sharded(path)
    files = [path] if directory is None else sorted(p for p in directory.iterdir() if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        name = "" if directory is None else file.name
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        for sample in _samples(file):
            digest.update(sample)
    return digest.hexdigest()


def _samples(file: Path) -> Iterator[bytes]:
    fd = open_regular(file)
    try:
        num_bytes = os.fstat(fd).st_size
        last = max(0, num_bytes - SAMPLE_BYTES)
        for sample in range(SAMPLES):
            offset = last * sample // (SAMPLES - 1)
            yield read_exactly(fd, min(SAMPLE_BYTES, num_bytes - offset), offset)
    finally:
        os.close(fd)
