"""UrlStorage: a job in an object store or another file system that fsspec knows.

Objects appear whole or not at all, and cannot be added to: a log is a folder of an object a line.
There are no locks: a later run of a job takes it over, and the earlier one notices before it
commits.
"""

import os
import tempfile
from typing import Any, BinaryIO, cast

import fsspec
from typing_extensions import override

from moe_lightning.errors import UsageError
from moe_lightning.extras import with_extra
from moe_lightning.jobs.storage import AbstractWriter, Storage


class UrlStorage(Storage):
    """Files below a URL.

    Args:
        url: Such as ``s3://bucket/run``.

    Raises:
        UsageError: If fsspec does not know its protocol, or lacks the package for it.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ValueError, ImportError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"{url}: {with_extra(reason)}.") from error
        self._num_lines: dict[str, int] = {}

    @override
    def writer(self, name: str) -> AbstractWriter:
        return _UrlWriter(self._files, self._path(name))

    @override
    def claim(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        self._make_folder(path)
        try:
            self._files.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    @override
    def append(self, name: str, line: bytes) -> None:
        if name not in self._num_lines:  # this process may have another storage for the same log
            self._num_lines[name] = len(self.names(name))
        number = self._num_lines[name]
        path = self._path(f"{name}/{number:08d}")
        self._make_folder(path)
        self._files.pipe_file(path, line)
        self._num_lines[name] = number + 1

    @override
    def logs(self, folder: str) -> dict[str, bytes]:
        return {
            log: b"".join(self.read(line) or b"" for line in self.names(log))
            for log in self.names(folder)
        }

    @override
    def names(self, folder: str) -> list[str]:
        try:
            found = self._files.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        names = (str(each).rstrip("/").rpartition("/")[2] for each in found)
        return sorted(f"{folder}/{name}" for name in names)

    @override
    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, self._files.open(self._path(name), "rb"))

    @override
    def exists(self, name: str) -> bool:
        return bool(self._files.exists(self._path(name)))

    @override
    def remove(self, name: str) -> None:
        if self.exists(name):
            self._files.rm_file(self._path(name))

    @override
    def remove_folder(self, folder: str) -> None:
        if self.exists(folder):
            self._files.rm(self._path(folder), recursive=True)

    @override
    def lock(self) -> None:
        self._files.makedirs(self._root, exist_ok=True)

    @override
    def close(self) -> None:
        pass

    def _make_folder(self, path: str) -> None:
        """Object stores have no folders, but other file systems do."""
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class _UrlWriter(AbstractWriter):
    """Written to a local temporary file, and sent when it is whole."""

    def __init__(self, files: Any, path: str) -> None:
        self._files = files
        self._path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> BinaryIO:
        fd, self._temporary = tempfile.mkstemp(prefix="moe_lightning-")
        self._file = os.fdopen(fd, "wb")
        return self._file

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        assert self._file is not None, "the block was entered"
        try:
            self._file.close()
            if error is None:
                self._files.makedirs(self._path.rpartition("/")[0], exist_ok=True)
                self._files.put_file(self._temporary, self._path)
        finally:
            os.unlink(self._temporary)
