"""Writing files so that a reader sees the old one or the new one, never half of one."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path`` that takes its name when the block ends well, and is
    removed otherwise.

    Args:
        path: The file to write; its directory exists.

    Yields:
        The temporary file, open for bytes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # see remove_temporaries
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a write that fails does not say where
        raise


def remove_temporaries(directory: Path) -> None:
    """Remove what processes that were killed left half written.

    Args:
        directory: Where nobody else is writing.
    """
    for path in directory.glob(".*.tmp"):
        if path.name.split(".")[-2].isdecimal():
            path.unlink(missing_ok=True)


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that there is no space left, on the disk or of a quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: Path, text: str) -> None:
    """Write a whole text file.

    Args:
        path: The file.
        text: Its content.
    """
    with atomic_writer(path) as file:
        file.write(text.encode())
