"""A disk in memory that is stricter than simulated_disk.py, with processes that take turns.

After a power cut
- a file's content is what was synced last, then any first part of what was added since, then maybe
  zeros up to its length (the size was written, the data was not);
- a name in a directory is what it was at the directory's last sync, or after any change of it
  since, each name for itself;
- a directory is a name like any other: without it all below it is lost. Only the one that the
  simulation begins with is safe.
What a sync could not write is lost, whatever later syncs say: the system forgets that it was dirty.

Locks belong to a file, not to its name, as flock's do. Every operation, those that only look too,
may fail, be the last, or let other processes in between (`Process.before`).
"""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

from simulated_disk import Crash

from moe_lightning.jobs.file_operations import FileOperations


class File:
    """Content, and what of it is safe."""

    __slots__ = ("data", "lost", "owner", "synced")

    def __init__(self) -> None:
        self.data = self.synced = b""
        self.lost = range(0)  # bytes that a sync could not write
        self.owner: Process | None = None

    def sync(self) -> None:
        data = bytearray(self.data)
        for at in self.lost:
            data[at : at + 1] = b"\0" * (at < len(data))
        self.synced = bytes(data)

    def cut(self, num_bytes: int) -> None:
        self.data = self.data[:num_bytes]
        self.lost = range(self.lost.start, min(self.lost.stop, num_bytes))

    def power_cut(self, random: Random) -> None:
        if self.data.startswith(self.synced):
            kept = random.randint(len(self.synced), len(self.data))
            zeros = random.choice((0, 0, len(self.data) - kept))
            self.data = self.data[:kept] + b"\0" * zeros
        else:
            self.data = random.choice((self.synced, self.data))
        self.synced, self.lost, self.owner = self.data, range(0), None


class Directory:
    """Names, and what they were since the last sync."""

    def __init__(self) -> None:
        self.names: dict[str, File | Directory] = {}
        self.histories: dict[str, list[File | Directory | None]] = {}

    def set(self, name: str, node: "File | Directory | None") -> None:
        self.histories.setdefault(name, [self.names.get(name)]).append(node)
        if node is None:
            self.names.pop(name, None)
        else:
            self.names[name] = node

    def power_cut(self, random: Random) -> None:
        for name, history in self.histories.items():
            node = random.choice(history)
            if node is None:
                self.names.pop(name, None)
            else:
                self.names[name] = node
        self.histories.clear()
        for node in self.names.values():
            node.power_cut(random)


class StrictDisk:
    """What all processes see.

    Args:
        root: A directory that is there, and safe.
    """

    def __init__(self, root: Path = Path("/run")) -> None:
        self.top = Directory()
        self._at(root, make=True)
        for path in (*root.parents, root):
            self._at(path).histories.clear()

    def power_cut(self, random: Random) -> None:
        self.top.power_cut(random)

    def content(self, path: Path) -> bytes | None:
        node = self.find(path)
        return node.data if isinstance(node, File) else None

    def files(self) -> set[str]:
        found, waiting = set(), [("", self.top)]
        while waiting:
            place, directory = waiting.pop()
            for name, node in directory.names.items():
                if isinstance(node, Directory):
                    waiting.append((f"{place}/{name}", node))
                else:
                    found.add(f"{place}/{name}")
        return found

    def find(self, path: Path) -> File | Directory | None:
        node: File | Directory | None = self.top
        for name in path.parts[1:]:
            node = node.names.get(name) if isinstance(node, Directory) else None
        return node

    def _at(self, path: Path, *, make: bool = False) -> Directory:
        node = self.top
        for name in path.parts[1:]:
            if make and name not in node.names:
                node.set(name, Directory())
            node = node.names.get(name)
            if not isinstance(node, Directory):
                raise FileNotFoundError(errno.ENOENT, "missing", str(path))
        return node


class Process(FileOperations):
    """File operations of one process.

    Args:
        disk: The disk.
        faults: What happens instead of an operation, by its number: ``"crash"``, ``"torn"`` (half
            of the data is written before the crash) or an errno, which spares the process.
        has_locks: Whether the file system knows locks.
        before: Called before each operation, with its number.
    """

    def __init__(
        self,
        disk: StrictDisk,
        faults: dict[int, int | str] | None = None,
        *,
        has_locks: bool = True,
        before: Callable[[int], None] | None = None,
    ) -> None:
        self.disk = disk
        self.faults = dict(faults or {})
        self.log: list[str] = []
        self.is_dead = False
        self.before = before
        self._has_locks = has_locks
        self._files: dict[int, File] = {}
        self._locked: dict[int, File] = {}
        self._next = 3

    @property
    def num_operations(self) -> int:
        return len(self.log)

    def die(self) -> None:
        self.is_dead = True
        for file in self._locked.values():
            if file.owner is self:
                file.owner = None

    def _step(self, what: str, path: object, file: File | None = None, data: bytes = b"") -> None:
        if self.is_dead:
            raise Crash
        number = len(self.log)
        self.log.append(f"{what} {path}")
        if self.before is not None:
            self.before(number)
            if self.is_dead:
                raise Crash
        fault = self.faults.pop(number, None)
        if fault is None:
            return
        if file is not None and fault != "crash":
            file.data += data[: len(data) // 2]
            if what == "sync" and fault != "torn":
                file.lost = range(len(file.synced), len(file.data))
        if fault in ("crash", "torn"):
            self.die()
            raise Crash
        assert isinstance(fault, int)
        raise OSError(fault, os.strerror(fault))

    def make_directory(self, path):
        self._step("make_directory", path)
        self.disk._at(path, make=True)

    def create(self, path):
        self._step("create", path)
        if self.disk.find(path) is not None:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        return self._opened(path)

    def open_end(self, path):
        self._step("open_end", path)
        return self._opened(path)

    def _opened(self, path):
        directory = self.disk._at(path.parent)
        if path.name not in directory.names:
            directory.set(path.name, File())
        fd, self._next = self._next, self._next + 1
        file = directory.names[path.name]
        assert isinstance(file, File), path
        self._files[fd] = file
        return fd

    def write(self, fd, data):
        file = self._files[fd]
        self._step("write", "", file, data)
        file.data += data
        return len(data)

    def size(self, fd):
        self._step("size", "")
        return len(self._files[fd].data)

    def truncate(self, fd, num_bytes):
        self._step("truncate", "")
        self._files[fd].cut(num_bytes)

    def sync(self, fd):
        self._step("sync", "", self._files[fd])
        self._files[fd].sync()

    def close(self, fd):
        # Linux closes a descriptor even if it says that this failed.
        try:
            self._step("close", "")
        finally:
            if not self.is_dead:
                del self._files[fd]
                if (file := self._locked.pop(fd, None)) is not None and file.owner is self:
                    file.owner = None

    def rename(self, path, target):
        self._step("rename", target)
        source = self.disk._at(path.parent)
        file = source.names.get(path.name)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "missing", str(path))
        self.disk._at(target.parent).set(target.name, file)
        source.set(path.name, None)

    def sync_directory(self, path):
        self._step("sync_directory", path)
        self.disk._at(path).histories.clear()

    def remove(self, path):
        self._step("remove", path)
        if isinstance(self.disk.find(path), File):
            self.disk._at(path.parent).set(path.name, None)

    def remove_directory(self, path):
        self._step("remove_directory", path)
        directory = self.disk.find(path)
        if isinstance(directory, Directory):
            if directory.names:
                raise OSError(errno.ENOTEMPTY, "not empty", str(path))
            self.disk._at(path.parent).set(path.name, None)

    def exists(self, path):
        self._step("exists", path)
        return self.disk.find(path) is not None

    def is_directory(self, path):
        self._step("is_directory", path)
        return isinstance(self.disk.find(path), Directory)

    def names(self, path):
        self._step("names", path)
        directory = self.disk.find(path)
        names = directory.names if isinstance(directory, Directory) else ()
        # Temporary names end in "-" and a random number, on which nothing may depend here.
        return sorted(names, key=lambda name: name.rpartition("-")[0] or name)

    def read(self, path):
        self._step("read", path)
        file = self.disk.find(path)
        if not isinstance(file, File):
            raise FileNotFoundError(errno.ENOENT, "missing", str(path))
        return io.BytesIO(file.data)

    def lock(self, path):
        while True:
            self._step("open to lock", path)
            fd = self._opened(path)
            file = self._files[fd]
            self._step("lock", path)
            if self._has_locks and file.owner not in (None, self):
                del self._files[fd]
                return None
            if not self._has_locks:
                return fd
            file.owner, self._locked[fd] = self, file
            self._step("look at the lock", path)
            if self.disk.find(path) is file:
                return fd
            self.close(fd)  # whoever had it has removed it meanwhile
