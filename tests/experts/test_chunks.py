"""Chunks hold every row once, in order, and no more rows than allowed."""

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.experts.chunks import cut


def shown(counts, limit_rows):
    chunks = cut(list(accumulate(counts)), limit_rows=limit_rows)
    return [(chunk.start, chunk.end, [tuple(piece) for piece in chunk.pieces]) for chunk in chunks]


def test_by_hand():
    assert shown([3, 0, 2, 7], 5) == [
        (0, 5, [(0, 3), (2, 2)]),
        (5, 10, [(3, 5)]),
        (10, 12, [(3, 2)]),
    ]
    # An expert that does not fit beside others begins a chunk, and others join its rest.
    assert shown([2, 6, 1], 4) == [(0, 2, [(0, 2)]), (2, 6, [(1, 4)]), (6, 9, [(1, 2), (2, 1)])]
    assert shown([0, 0], 4) == []
    assert shown([], 4) == []


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 12))
def test_every_row_is_in_one_chunk(counts, limit_rows):
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    position = 0
    for chunk in cut(list(accumulate(counts)), limit_rows=limit_rows):
        assert chunk.start == position
        assert 0 < chunk.end - chunk.start <= limit_rows
        rows = [piece.expert for piece in chunk.pieces for _ in range(piece.num_rows)]
        assert rows == experts[chunk.start : chunk.end]
        assert all(piece.num_rows > 0 for piece in chunk.pieces)
        position = chunk.end
    assert position == len(experts)
