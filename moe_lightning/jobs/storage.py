"""Storage: where a job keeps its files, whether in a directory or at a URL.

Names are relative, with slashes. What a method has written when it returns survives a power cut.
"""

from abc import ABC, abstractmethod
from typing import BinaryIO

TEMPORARY = "job/tmp"
LOCK = "job/lock"


class Storage(ABC):
    """Files of a job."""

    @abstractmethod
    def writer(self, name: str) -> "AbstractWriter":
        """Write a file of any size, which appears whole, when the block ends well, or not at all.

        Args:
            name: Its name; an older file of that name is replaced.

        Returns:
            A context manager that gives a file to write to.
        """

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file, replacing an older one."""
        with self.writer(name) as file:
            file.write(data)

    @abstractmethod
    def claim(self, name: str, data: bytes) -> bool:
        """Make a file that only one process can make.

        Args:
            name: Its name.
            data: Its content; half of it may be there after a crash.

        Returns:
            Whether it was this process.
        """

    @abstractmethod
    def append(self, name: str, line: bytes) -> None:
        """Add a line to a log."""

    @abstractmethod
    def logs(self, folder: str) -> dict[str, bytes]:
        """All logs of a folder: names and what was appended, in order."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted, with the folder's."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open a file to read, seekable.

        Raises:
            FileNotFoundError: If it is missing.
        """

    def read(self, name: str) -> bytes | None:
        """Read a whole file; None if it is missing."""
        try:
            with self.open(name) as file:
                return file.read()
        except FileNotFoundError:
            return None

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; one that is missing is no error."""

    @abstractmethod
    def remove_folder(self, folder: str) -> None:
        """Remove a folder and all in it. After a crash, some of it may be left."""

    @abstractmethod
    def lock(self) -> None:
        """Keep other processes from opening the job, until `close`.

        Raises:
            UsageError: If another process has it.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the lock back."""


class AbstractWriter(ABC):
    """A file that is being written."""

    @abstractmethod
    def __enter__(self) -> BinaryIO: ...

    @abstractmethod
    def __exit__(self, kind: object, error: object, traceback: object) -> None: ...
