"""LocalStorage: a job in a directory, each file written so that it survives a power cut, or is not
there."""

import io
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from typing_extensions import override

from moe_lightning.errors import UsageError
from moe_lightning.jobs.file_operations import FileOperations
from moe_lightning.jobs.storage import LOCK, TEMPORARY, AbstractWriter, Storage

_BUFFER_BYTES = 2**20


class LocalStorage(Storage):
    """A local directory, or one that several machines mount.

    Args:
        root: The directory; made if missing.
        operations: How files are touched.
    """

    def __init__(self, root: Path, operations: FileOperations | None = None) -> None:
        self.root = root
        self._do = operations or FileOperations()
        self._lock: int | None = None
        process = f"process {os.getpid()} of {socket.gethostname()}"
        self._name = f"{process}\n{secrets.token_hex(4)}\n".encode()
        self._made: set[Path] = set()
        self._torn: set[str] = set()  # logs that may end in the middle of a line
        self._named: set[str] = set()  # logs whose names would survive a power cut

    @override
    def writer(self, name: str) -> AbstractWriter:
        temporary = self._path(
            f"{TEMPORARY}/{Path(name).name}.{os.getpid()}-{secrets.token_hex(4)}"
        )
        return _LocalWriter(self._do, temporary, self._path(name))

    @override
    def claim(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        try:
            fd = self._do.create(path)
        except FileExistsError:
            return False
        with self._closing(fd):
            write_all(self._do, fd, data)
            self._do.sync(fd)
        self._do.sync_directory(path.parent)
        return True

    @override
    def append(self, name: str, line: bytes) -> None:
        path = self._path(name)
        fd = self._do.open_end(path)
        with self._closing(fd):
            num_bytes = self._do.size(fd)
            # Half a line, which could not be taken back, would spoil the one after it.
            line = b"\n" + line if name in self._torn else line
            self._torn.add(name)
            try:
                write_all(self._do, fd, line)
                self._do.sync(fd)
            except OSError:
                self._do.truncate(fd, num_bytes)
                self._torn.discard(name)
                raise
            self._torn.discard(name)
        if name not in self._named:
            self._do.sync_directory(path.parent)
            self._named.add(name)

    @override
    def logs(self, folder: str) -> dict[str, bytes]:
        return {name: self.read(name) or b"" for name in self.names(folder)}

    @override
    def names(self, folder: str) -> list[str]:
        return [f"{folder}/{name}" for name in self._do.names(self.root / folder)]

    @override
    def open(self, name: str) -> BinaryIO:
        return self._do.read(self.root / name)

    @override
    def exists(self, name: str) -> bool:
        return self._do.exists(self.root / name)

    @override
    def remove(self, name: str) -> None:
        if self.exists(name):
            self._do.remove(self.root / name)
            self._do.sync_directory((self.root / name).parent)

    @override
    def remove_folder(self, folder: str) -> None:
        for name in self.names(folder):
            if self._do.is_directory(self.root / name):
                self.remove_folder(name)
            else:
                self._do.remove(self.root / name)
        self._do.remove_directory(self.root / folder)
        self._made.discard(self.root / folder)

    @override
    def lock(self) -> None:
        try:
            self._lock = self._do.lock(self._path(LOCK))
        except FileNotFoundError:  # whoever had it has removed the directory meanwhile
            self._made.discard((self.root / LOCK).parent)
            self._lock = self._do.lock(self._path(LOCK))
        if self._lock is None:
            lines = (self.read(LOCK) or b"").decode(errors="replace").splitlines()
            holder = lines[0] if lines else "another process"
            raise UsageError(
                f"{self.root}: {holder} is at work there. Wait for it, end it, or choose another "
                "--output_dir."
            )
        with suppress(OSError):
            self._do.truncate(self._lock, 0)
            self._do.write(self._lock, self._name)

    @override
    def close(self) -> None:
        if self._lock is not None:
            path = self.root / LOCK
            with suppress(OSError):
                if self.read(LOCK) == self._name:  # without locks, another run may have taken over
                    self._do.remove(path)
                    self._do.remove_directory(path.parent)  # if there is no job in it
            with suppress(OSError):
                self._do.close(self._lock)
            self._lock = None

    @contextmanager
    def _closing(self, fd: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with suppress(OSError):
                self._do.close(fd)
            raise
        self._do.close(fd)  # some file systems say only now that they are full

    def _path(self, name: str) -> Path:
        """Where a file goes; its directory is made, once."""
        path = self.root / name
        if path.parent not in self._made:
            self._do.make_directory(path.parent)
            new = [directory for directory in path.parents if directory.is_relative_to(self.root)]
            for directory in new[:-1]:  # the last is the root
                if directory not in self._made:
                    self._do.sync_directory(directory.parent)
            self._made.update(new)
        return path


class _LocalWriter(AbstractWriter):
    """Temporary name, sync, rename, sync of the directory."""

    def __init__(self, operations: FileOperations, temporary: Path, path: Path) -> None:
        self._do = operations
        self._temporary = temporary
        self._path = path
        self._file: _BufferedFile | None = None

    def __enter__(self) -> BinaryIO:
        fd = self._do.create(self._temporary)
        self._file = _BufferedFile(self._do, fd)
        return self._file  # type: ignore[return-value]  # as much of one as writers need

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        file = self._file
        assert file is not None, "the block was entered"
        if error is not None:
            self._give_up(file.fd)
            return
        try:
            file.flush()
            self._do.sync(file.fd)
            fd, file.fd = file.fd, -1
            self._do.close(fd)
            self._do.rename(self._temporary, self._path)
            self._do.sync_directory(self._path.parent)
        except BaseException:
            self._give_up(file.fd)
            raise

    def _give_up(self, fd: int) -> None:
        if fd >= 0:
            with suppress(OSError):
                self._do.close(fd)
        with suppress(OSError):
            self._do.remove(self._temporary)


class _BufferedFile(io.RawIOBase):
    """Bytes go out in large pieces; whoever made it closes the descriptor."""

    def __init__(self, operations: FileOperations, fd: int) -> None:
        self._do = operations
        self.fd = fd
        self._pieces: list[bytes] = []
        self._num_waiting = self._num_written = 0

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        piece = bytes(data)
        self._pieces.append(piece)
        self._num_waiting += len(piece)
        if self._num_waiting >= _BUFFER_BYTES:
            self._send()
        return len(piece)

    @override
    def tell(self) -> int:
        return self._num_written + self._num_waiting

    @override
    def flush(self) -> None:
        if self._num_waiting and self.fd >= 0:
            self._send()

    @override
    def close(self) -> None:
        pass

    def __del__(self) -> None:
        pass  # io's own would flush

    def _send(self) -> None:
        data = b"".join(self._pieces)
        write_all(self._do, self.fd, data)
        self._num_written += len(data)
        self._pieces, self._num_waiting = [], 0


def write_all(operations: FileOperations, fd: int, data: bytes) -> None:
    """Write all of the data.

    Args:
        operations: How.
        fd: Where to.
        data: What.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[operations.write(fd, bytes(rest)) :]
