"""Tokenised rows in memory, at 4 bytes a token."""

from array import array

from moe_lightning.data.records import Row, RowOptions


class RowStore:
    """Rows that are kept instead of being read and tokenised again, up to a limit.

    Args:
        max_tokens: Number of tokens to hold at most; a row counts as 16 more, for its id.
    """

    def __init__(self, *, max_tokens: int) -> None:
        self._free_tokens = max_tokens
        self._token_ids = array("i")
        self._slices: dict[int, tuple[int, int]] = {}
        self._facts: dict[int, tuple[int, str | int, RowOptions, int | None]] = {}

    def add(self, row: Row) -> bool:
        """Keep a row; returns False, and forgets all rows, once they are too many."""
        self._free_tokens -= len(row.token_ids) + 16
        if self._free_tokens < 0:
            self._token_ids, self._slices, self._facts = array("i"), {}, {}
            return False
        start = len(self._token_ids)
        self._token_ids.extend(row.token_ids)
        self._slices[row.row] = (start, len(self._token_ids))
        self._facts[row.row] = (row.line, row.id, row.options, row.offset)
        return True

    def get(self, row: int) -> Row:
        """Return a kept row by its number."""
        start, stop = self._slices[row]
        line, id_, options, offset = self._facts[row]
        return Row(row, line, id_, self._token_ids[start:stop].tolist(), options, offset)
