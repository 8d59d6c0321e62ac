"""Is another machine's copy of a checkpoint the same as ours? A hash that reads a little of every
file."""

import hashlib
import os

from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.file_reading import open_regular, read_exactly

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
        fd = open_regular(file)
        try:
            num_bytes = os.fstat(fd).st_size
            last = max(0, num_bytes - SAMPLE_BYTES)
            for sample in range(SAMPLES):
                offset = last * sample // (SAMPLES - 1)
                digest.update(read_exactly(fd, min(SAMPLE_BYTES, num_bytes - offset), offset))
        finally:
            os.close(fd)
    return digest.hexdigest()
