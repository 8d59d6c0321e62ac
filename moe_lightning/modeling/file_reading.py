"""Reading files that a user names or that came from a network: never trusted, never waited on.

A missing, unreadable or misnamed file (a git-LFS pointer, a web page) is told apart here, once, for
weights and JSON alike.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from moe_lightning.errors import CheckpointError

START_BYTES = 1024
_MAX_TEXT_BYTES = 2**30


def open_regular(file: Path) -> int:
    """Open a file for reading, without ever waiting on it.

    Args:
        file: The file; symbolic links are followed, as in the cache of the Hugging Face hub.

    Returns:
        A file descriptor, which the caller closes.

    Raises:
        CheckpointError: If it is missing, a dangling link, no regular file, or not readable; the
            message says which.
    """
    try:
        # O_NONBLOCK: opening a FIFO would otherwise wait for a writer for ever.
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        if file.is_symlink():
            raise CheckpointError(
                f"{file}: is a symbolic link to {os.readlink(file)}, which does not exist. "
                "Restore the link's target, or download the checkpoint again."
            ) from error
        raise CheckpointError(f"{file}: no such file. Download the checkpoint again.") from error
    except PermissionError as error:
        raise CheckpointError(
            f"{file}: permission denied for user {os.geteuid()}. Make the file readable: chmod +r "
            f"{file.name}"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be opened ({error.strerror}). Check the file system."
        ) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(
            f"{file}: is no regular file. Put the checkpoint's file in its place."
        )
    return fd


def read_exactly(fd: int, num_bytes: int, offset: int) -> bytes:
    """Read bytes at an offset; fewer only where the file ends or the device fails.

    Args:
        fd: File descriptor.
        num_bytes: How many bytes to read.
        offset: First byte, counted from the start of the file.

    Returns:
        The bytes that there are.
    """
    parts = []
    while num_bytes > 0 and (part := os.pread(fd, num_bytes, offset)):
        parts.append(part)
        num_bytes -= len(part)
        offset += len(part)
    return b"".join(parts)


def refuse_impostor(file: Path, start: bytes) -> None:
    """Refuse a git-LFS pointer, a web page or an empty file that bears the name of a checkpoint's
    file.

    Args:
        file: The file.
        start: Its first bytes.

    Raises:
        CheckpointError: If it is one of these; the message says which and how to get the real file.
    """
    if not start:
        raise CheckpointError(f"{file}: the file is empty. Download it again.")
    text = start[:START_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        raise CheckpointError(
            f"{file}: is a git-LFS pointer, not the file itself. Run `git lfs install && git lfs "
            f"pull` in {file.parent}, or download the checkpoint with `hf download`."
        )
    if text.startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(
            f"{file}: is an HTML page (of an error or a log-in), not the file itself. Download it "
            "again with `hf download`, after `hf auth login` if the model is gated."
        )


def read_bytes(file: Path) -> bytes:
    """Read a small file.

    Args:
        file: The file.

    Returns:
        Its content.

    Raises:
        CheckpointError: If it cannot be opened or read.
    """
    fd = open_regular(file)
    # The file object closes the descriptor, and can do what pread does.
    with open(fd, "rb") as stream:
        try:
            return read_exactly(stream.fileno(), _MAX_TEXT_BYTES, 0)
        except OSError as error:
            raise CheckpointError(
                f"{file}: cannot be read ({error.strerror}). Check the disk."
            ) from error


def read_json_object(file: Path) -> tuple[bytes, dict[str, Any]]:
    """Read a JSON file whose content is an object.

    Args:
        file: The file.

    Returns:
        Its bytes, and the object.

    Raises:
        CheckpointError: If it is missing, unreadable, a git-LFS pointer, a web page, or no JSON
            object.
    """
    content = read_bytes(file)
    refuse_impostor(file, content)
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: is not valid JSON ({error}). The file is damaged or was edited by hand; "
            "correct it, or download it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file}: holds a JSON {type(value).__name__} where an object belongs. Download the "
            "file again."
        )
    return content, value
