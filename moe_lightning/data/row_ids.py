"""Finding ids that occur twice, in memory that does not grow with the length of the ids."""

import json
from array import array
from bisect import bisect_left
from hashlib import blake2b

_FIRST_SIZE = 1024


class IdIndex:
    """The ids seen so far, as 64-bit hashes: 14 to 20 bytes a row.

    `hashes[row]` is the row's hash; `table` is an open-addressing hash table of `row + 1`, 0 for a
    free slot, at most two thirds full. Two different ids are taken for equal with probability
    rows² / 2⁶⁵ (one in four thousand million for 10⁵ rows).
    """

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._table = array("I", [0]) * _FIRST_SIZE  # rows fit 32 bits
        self._num_used = 0

    def add(self, id: str | int, *, row: int) -> int | None:
        """Remember a row's id.

        Args:
            id: The id; 1 and "1" are different ones.
            row: The row's number, larger than all before.

        Returns:
            The row that had the id first, or None for a new id.
        """
        digest = blake2b(json.dumps(id).encode(), digest_size=8).digest()
        hash_ = int.from_bytes(digest, "little")
        slot = self._find(hash_)
        if self._table[slot]:
            return self._table[slot] - 1
        # Rows without an id in the index, bad ones, keep a place that is never looked at.
        self._hashes.extend([0] * (row - len(self._hashes)))
        self._hashes.append(hash_)
        self._table[slot] = row + 1
        self._num_used += 1
        if 3 * self._num_used > 2 * len(self._table):
            self._grow()
        return None

    def _find(self, hash_: int) -> int:
        table, hashes, mask = self._table, self._hashes, len(self._table) - 1
        slot = hash_ & mask
        while (entry := table[slot]) and hashes[entry - 1] != hash_:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self._table
        self._table = array("I", [0]) * (2 * len(old))
        for entry in old:
            if entry:
                self._table[self._find(self._hashes[entry - 1])] = entry


class DuplicateRows:
    """The rows whose id an earlier row has, 16 bytes each."""

    def __init__(self) -> None:
        self._rows = array("q")
        self._first_rows = array("q")

    def add(self, row: int, *, first_row: int) -> None:
        """Remember that `row` repeats the id of `first_row`; rows come in ascending order."""
        self._rows.append(row)
        self._first_rows.append(first_row)

    def first_row(self, row: int) -> int | None:
        """Return the earlier row with the same id, or None for a row that is no duplicate."""
        at = bisect_left(self._rows, row)
        if at < len(self._rows) and self._rows[at] == row:
            return self._first_rows[at]
        return None
