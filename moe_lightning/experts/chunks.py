"""Sorted rows cut into chunks of whole experts where they fit, and of parts of one where not.

Chunks bound the memory of what is between two products, and keep it in the CPU's caches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from moe_lightning.experts.packed_weights import Piece


@dataclass(slots=True)
class Chunk:
    """Some of the sorted rows.

    Attributes:
        start: The first.
        end: Behind the last.
        pieces: Their experts, in order.
    """

    start: int
    end: int
    pieces: list[Piece] = field(default_factory=list)


def cut(ends_E: Sequence[int], *, limit_rows: int) -> Iterator[Chunk]:
    """Cut sorted rows into chunks.

    Args:
        ends_E: For each expert, the end of its rows.
        limit_rows: The most rows of a chunk.

    Yields:
        Chunks that together hold every row once, in order; none is empty. For example, experts of
        3, 0, 2 and 7 rows, at most 5 at a time: 3 + 2, then 5, then 2 rows.
    """
    chunk = Chunk(0, 0)
    for expert, (start, end) in enumerate(pairwise((0, *ends_E))):
        while start < end:
            if chunk.pieces and end - chunk.start > limit_rows:
                yield chunk
                chunk = Chunk(start, start)
            chunk.end = min(end, chunk.start + limit_rows)
            chunk.pieces.append(Piece(expert, chunk.end - start))
            start = chunk.end
    if chunk.pieces:
        yield chunk
