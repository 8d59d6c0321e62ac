"""Memory to read weights into, which goes back to the system as soon as it is freed.

The C library serves buffers of up to 32 MiB from heaps, one for each loading thread, and keeps them
there when they are freed: a load would hold its weights and a good part of its read buffers.
"""

import math
import mmap

import torch
from torch import Tensor

MIN_BYTES = 2**18  # smaller buffers do not matter, and would waste most of their last page


def empty_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the host with pages of its own.

    Args:
        shape: Its sizes.
        dtype: Its dtype.

    Returns:
        The tensor, on the CPU even under ``torch.device("meta")``.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < MIN_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    pages = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # fewer page faults
    with torch.device("cpu"):
        return torch.frombuffer(pages, dtype=dtype).view(shape)
