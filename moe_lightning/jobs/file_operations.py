"""FileOperations: everything that a job does to local files, one method for each thing that can
fail, or be the last that happened before a crash."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import BinaryIO


class FileOperations:
    """The operating system's own. Tests replace some to fail, or all to simulate crashes."""

    def make_directory(self, path: Path) -> None:
        """Make a directory and those above it."""
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path) -> int:
        """Open a new file to write to.

        Args:
            path: The file.

        Returns:
            Its descriptor.

        Raises:
            FileExistsError: If there is one.
        """
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def open_end(self, path: Path) -> int:
        """Open a file, made if missing, to write at its end; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, data: bytes) -> int:
        """Write some of the data; returns how many bytes."""
        return os.write(fd, data)

    def size(self, fd: int) -> int:
        """Size of an open file in bytes."""
        return os.fstat(fd).st_size

    def truncate(self, fd: int, num_bytes: int) -> None:
        """Cut an open file."""
        os.ftruncate(fd, num_bytes)

    def sync(self, fd: int) -> None:
        """Wait until a file's content would survive a power cut."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def rename(self, path: Path, target: Path) -> None:
        """Give a file another name, whoever had that before."""
        os.replace(path, target)

    def sync_directory(self, path: Path) -> None:
        """Wait until the names in a directory would survive a power cut."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        """Remove a file; one that is not there is none to remove."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(path)

    def exists(self, path: Path) -> bool:
        """Whether there is a file or directory of that name."""
        return path.exists()

    def is_directory(self, path: Path) -> bool:
        """Whether it is a directory."""
        return path.is_dir()

    def names(self, path: Path) -> list[str]:
        """Names in a directory, sorted; none if it is missing."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def read(self, path: Path) -> BinaryIO:
        """Open a file to read.

        Raises:
            FileNotFoundError: If it is missing.
        """
        return open(path, "rb")

    def lock(self, path: Path) -> int | None:
        """Take the lock that a file stands for, until the descriptor is closed or the process ends.

        Args:
            path: The file; made if missing.

        Returns:
            Its descriptor, or None if another process has the lock.
        """
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return None
            except OSError:  # a file system without locks; epochs keep two runs apart there
                return fd
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == os.stat(path).st_ino:
                    return fd
            os.close(fd)  # whoever had it has removed it meanwhile
