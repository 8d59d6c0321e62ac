"""Parts: the committed parts of a job, read in the order of the input.

Only positions are held in memory, 48 bytes a row; answers are copied from file to file.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from moe_lightning.jobs.ledger import PartEntry
from moe_lightning.jobs.storage import Storage

_MAX_OPEN = 64
_COLUMNS = 5  # row, is answered, part, offset, bytes


class Parts:
    """Rows of parts.

    Args:
        storage: Where they are.

    Attributes:
        num_damaged: Parts that were not what the ledger says, and were left out.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._names: list[str] = []
        self._found = array("q")
        self._places: NDArray[np.int64] | None = None
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        self.num_damaged = 0

    def add(self, entry: PartEntry) -> bool:
        """Take a part in, if it is what the ledger says.

        Where a row is in several parts, an answer counts more than an error, and a later part more
        than an earlier one.

        Args:
            entry: Its line in the ledger.

        Returns:
            Whether it was.
        """
        content = self._storage.read(entry.part)
        if (
            content is None
            or len(content) != entry.num_bytes
            or hashlib.sha256(content).hexdigest() != entry.sha256
        ):
            self.num_damaged += 1
            return False
        offset = 0
        for line in content.split(b"\n")[:-1]:
            row, kind, _ = line.split(b"\t", 2)
            skip = len(row) + len(kind) + 2
            is_ok, length = kind == b"ok", len(line) - skip
            self._found.extend((int(row), is_ok, len(self._names), offset + skip, length))
            offset += len(line) + 1
        self._names.append(entry.part)
        self._places = None
        return True

    def extend(self, entries: Iterable[PartEntry]) -> None:
        """Take in the parts that are not in yet; see ``add``."""
        known = set(self._names)
        for entry in entries:
            if entry.part not in known:
                self.add(entry)

    @property
    def rows_ok(self) -> NDArray[np.int64]:
        """Answered rows, sorted."""
        return self._rows(is_ok=True)

    @property
    def rows_failed(self) -> NDArray[np.int64]:
        """Failed rows, sorted."""
        return self._rows(is_ok=False)

    def read(self, row: int) -> bytes:
        """The JSON of a row.

        Args:
            row: Position in the input.

        Returns:
            Its line, without the line end.
        """
        places = self._sorted()
        _, _, part, offset, length = places[np.searchsorted(places[:, 0], row)].tolist()
        file = self._file(part)
        file.seek(offset)
        return file.read(length)

    def close(self) -> None:
        """Close the files that are open."""
        while self._open:
            self._open.popitem()[1].close()

    def _rows(self, *, is_ok: bool) -> NDArray[np.int64]:
        places = self._sorted()
        rows: NDArray[np.int64] = places[places[:, 1] == is_ok, 0]
        return rows

    def _sorted(self) -> NDArray[np.int64]:
        if self._places is None:
            found = np.array(self._found, dtype=np.int64).reshape(-1, _COLUMNS)
            found = found[np.lexsort((found[:, 2], found[:, 1], found[:, 0]))]
            is_last = np.ones(len(found), dtype=bool)
            is_last[:-1] = found[1:, 0] != found[:-1, 0]
            self._places = found[is_last]
        return self._places

    def _file(self, part: int) -> BinaryIO:
        if part in self._open:
            self._open.move_to_end(part)
        else:
            if len(self._open) == _MAX_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[part] = self._storage.open(self._names[part])
        return self._open[part]
