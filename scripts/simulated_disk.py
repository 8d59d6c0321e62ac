"""A disk in memory that loses what was not synced, and processes on it that crash.

The model is that of POSIX, weaker than ext4's: after a power cut the content of a file is what was
synced last, and any first part of what was added since; the names in a directory are those of its
last sync, and any first part of the changes since, each directory for itself. Directories
themselves do not get lost. After ``kill -9`` everything is as the process left it.
"""

import errno
import io
import os
from pathlib import Path
from random import Random

from moe_lightning.jobs.file_operations import FileOperations


class Crash(BaseException):
    """The process is dead."""


class Inode:
    __slots__ = ("data", "synced")

    def __init__(self):
        self.data = b""
        self.synced = b""


class Disk:
    """What all processes see."""

    def __init__(self):
        self.names = {}  # directory -> name -> Inode
        self.synced_names = {}
        self.changes = {}  # directory -> changes of names since its last sync
        self.locks = {}

    def change(self, path, inode):
        directory, name = str(path.parent), path.name
        if directory not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no directory", directory)
        if inode is None:
            self.names[directory].pop(name, None)
        else:
            self.names[directory][name] = inode
        self.changes[directory].append((name, inode))

    def find(self, path):
        return self.names.get(str(path.parent), {}).get(path.name)

    def power_cut(self, random: Random) -> None:
        for directory, changes in self.changes.items():
            names = dict(self.synced_names[directory])
            for name, inode in changes[: random.randint(0, len(changes))]:
                if inode is None:
                    names.pop(name, None)
                else:
                    names[name] = inode
            self.names[directory], self.synced_names[directory] = dict(names), names
            changes.clear()
        for names in self.names.values():
            for inode in names.values():
                if inode.data.startswith(inode.synced):
                    kept = random.randint(len(inode.synced), len(inode.data))
                    inode.data = inode.data[:kept]
                elif random.random() < 0.5:
                    inode.data = inode.synced
                inode.synced = inode.data
        self.locks.clear()

    def content(self, path):
        inode = self.find(Path(path))
        return None if inode is None else inode.data

    def files(self):
        return {f"{d}/{n}" for d, names in self.names.items() for n in names}


class Process(FileOperations):
    """File operations of one process.

    Args:
        disk: The disk.
        faults: What happens instead of an operation, by its number: ``"crash"``, ``"torn"`` (half
            of the data is written before the crash) or an errno, which spares the process.
        has_locks: Whether the file system knows locks.
    """

    def __init__(self, disk, faults=None, *, has_locks=True):
        self.disk = disk
        self.faults = dict(faults or {})
        self.num_operations = 0
        self.log = []
        self.is_dead = False
        self._has_locks = has_locks
        self._files = {}
        self._next, self._lock_fd = 3, -1

    def die(self):
        """Be killed: open files are closed, locks given back."""
        self.is_dead = True
        self.disk.locks = {p: owner for p, owner in self.disk.locks.items() if owner is not self}

    def _step(self, what, data=None, inode=None):
        if self.is_dead:
            raise Crash
        fault = self.faults.pop(self.num_operations, None)
        self.num_operations += 1
        self.log.append(what)
        if fault is None:
            return
        if fault in ("crash", "torn"):
            if fault == "torn" and data is not None:
                inode.data += data[: len(data) // 2]
            self.die()
            raise Crash
        if data is not None:
            inode.data += data[: len(data) // 2]
        raise OSError(fault, os.strerror(fault))

    def make_directory(self, path):
        self._step("make_directory")
        for directory in (path, *path.parents):
            for names in (self.disk.names, self.disk.synced_names):
                names.setdefault(str(directory), {})
            self.disk.changes.setdefault(str(directory), [])

    def create(self, path):
        self._step("create")
        if self.disk.find(path) is not None:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        return self._opened(path)

    def open_end(self, path):
        self._step("open_end")
        return self._opened(path)

    def _opened(self, path):
        inode = self.disk.find(path)
        if inode is None:
            inode = Inode()
            self.disk.change(path, inode)
        fd, self._next = self._next, self._next + 1
        self._files[fd] = inode
        return fd

    def write(self, fd, data):
        self._step("write", data, self._files.get(fd))
        self._files[fd].data += data
        return len(data)

    def size(self, fd):
        return len(self._files[fd].data)

    def truncate(self, fd, num_bytes):
        self._step("truncate")
        self._files[fd].data = self._files[fd].data[:num_bytes]

    def sync(self, fd):
        self._step("sync")
        self._files[fd].synced = self._files[fd].data

    def close(self, fd):
        # Linux closes a descriptor even if it says that this failed.
        del self._files[fd]
        if fd == self._lock_fd:
            locks = self.disk.locks
            self.disk.locks = {p: owner for p, owner in locks.items() if owner is not self}
        self._step("close")

    def rename(self, path, target):
        self._step("rename")
        inode = self.disk.find(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "missing", str(path))
        self.disk.change(target, inode)
        self.disk.change(path, None)

    def sync_directory(self, path):
        self._step("sync_directory")
        directory = str(path)
        self.disk.synced_names[directory] = dict(self.disk.names.get(directory, {}))
        self.disk.changes.setdefault(directory, []).clear()

    def remove(self, path):
        self._step("remove")
        if self.disk.find(path) is not None:
            self.disk.change(path, None)

    def remove_directory(self, path):
        self._step("remove_directory")
        directory = str(path)
        if self.disk.names.get(directory):
            raise OSError(errno.ENOTEMPTY, "not empty", directory)
        for names in (self.disk.names, self.disk.synced_names, self.disk.changes):
            names.pop(directory, None)

    def exists(self, path):
        return self.disk.find(path) is not None or str(path) in self.disk.names

    def is_directory(self, path):
        return str(path) in self.disk.names

    def names(self, path):
        directory = str(path)
        below = {
            d[len(directory) + 1 :].split("/")[0]
            for d in self.disk.names
            if d.startswith(f"{directory}/")
        }
        return sorted({*self.disk.names.get(directory, {}), *below})

    def read(self, path):
        if self.is_dead:
            raise Crash
        inode = self.disk.find(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "missing", str(path))
        return io.BytesIO(inode.data)

    def lock(self, path):
        self._step("lock")
        owner = self.disk.locks.get(str(path))
        if self._has_locks and owner is not None and owner is not self:
            return None
        self.disk.locks[str(path)] = self
        self._lock_fd = self._opened(path)
        return self._lock_fd
