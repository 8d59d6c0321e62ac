"""Giving memory that was freed back to the system."""

import ctypes
import sys


def release_freed_memory() -> None:
    """Make the C library give freed memory back, where it is glibc, which keeps it otherwise.

    Buffers of up to 32 MiB come from glibc's heaps, one for each loading thread, and stay there
    when they are freed: a load would hold its weights and a good part of its read buffers.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
