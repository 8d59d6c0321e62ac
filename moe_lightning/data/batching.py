"""Which rows are computed together: a fixed, numbered list of batches.

The plan depends on the rows and the options only, never on ranks, time or chance, so that every
rank and every later start of a job makes the same one.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def plan_batches(
    num_tokens_N: NDArray[np.integer], *, budget_tokens: int, window_rows: int = 65536
) -> list[NDArray[np.int64]]:
    """Group rows of similar length, so that little is padding.

    Rows are sorted by length, longest first, within windows of neighbouring rows (so that a batch
    reads from one region of the file), and cut into batches of `rows * longest <= budget_tokens`.

        lengths 5 2 9 3, budget 10   ->   [9] [5 3] [2]   ->   positions [2] [0 3] [1]

    Args:
        num_tokens_N: What each of N rows costs, in tokens.
        budget_tokens: Tokens of one batch, padding included. A row above it gets its own batch.
        window_rows: Number of neighbouring rows that are sorted together.

    Returns:
        Row positions of each batch, longest row first, equal ones in input order.

    Raises:
        ValueError: If the budget or the window is not positive.
    """
    if budget_tokens <= 0 or window_rows <= 0:
        raise ValueError(
            f"budget_tokens={budget_tokens} and window_rows={window_rows} must be positive"
        )
    costs_N = np.maximum(np.asarray(num_tokens_N, dtype=np.int64), 1)
    batches = []
    for window_start in range(0, len(costs_N), window_rows):
        window = costs_N[window_start : window_start + window_rows]
        order = np.argsort(-window, kind="stable")
        start = 0
        while start < len(order):
            num_rows = max(1, budget_tokens // int(window[order[start]]))
            batches.append(order[start : start + num_rows].astype(np.int64) + window_start)
            start += num_rows
    return batches


def padding_share(
    num_tokens_N: NDArray[np.integer], batches: Sequence[NDArray[np.integer]]
) -> float:
    """Return the share of a plan's tokens that is padding.

    Args:
        num_tokens_N: Tokens of each of N rows.
        batches: Row positions of each batch.

    Returns:
        `1 - tokens / (rows * longest row)`, summed over the batches; 0 without any.
    """
    num_tokens = sum(int(num_tokens_N[batch].sum()) for batch in batches)
    num_padded = sum(len(batch) * int(num_tokens_N[batch].max()) for batch in batches if len(batch))
    return 1 - num_tokens / num_padded if num_padded else 0.0


def split_by_length(
    num_tokens_N: Sequence[int], *, forward_tokens: int, budget_tokens: int
) -> list[list[int]]:
    """Split one batch into forwards, so that padding costs less than the forwards do.

    A forward costs its `rows * longest` tokens and a constant besides; the sum is made smallest by
    dynamic programming over the rows sorted by length (as for optimal line breaks).

        lengths 9 2 8 2, forward_tokens 5   ->   [0 2] [1 3]   cost 5 + 18 + 5 + 4, not 5 + 36

    Args:
        num_tokens_N: Tokens of each of N rows.
        forward_tokens: What a forward costs besides its tokens, counted in tokens.
        budget_tokens: Tokens of one forward, padding included. A row above it gets its own.

    Returns:
        Row positions of each forward, longest row first, equal ones in input order.
    """
    order = np.argsort(-np.asarray(num_tokens_N, dtype=np.int64), kind="stable")
    lengths = np.asarray(num_tokens_N, dtype=np.int64)[order]
    num_rows = len(order)
    cost = np.full(num_rows + 1, np.iinfo(np.int64).max)  # of the rows before a position
    cost[0] = 0
    cut = np.zeros(num_rows + 1, dtype=np.int64)
    for start in range(num_rows):
        most = max(1, budget_tokens // max(1, int(lengths[start])))
        end = min(num_rows, start + most)
        costs = cost[start] + forward_tokens + np.arange(1, end - start + 1) * lengths[start]
        is_less = costs < cost[start + 1 : end + 1]
        cost[start + 1 : end + 1][is_less] = costs[is_less]
        cut[start + 1 : end + 1][is_less] = start
    groups: list[list[int]] = []
    end = num_rows
    while end > 0:
        start = int(cut[end])
        groups.append(order[start:end].tolist())
        end = start
    return groups[::-1]
