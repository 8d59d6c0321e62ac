"""Rows sorted by expert, and back: the one permutation that every way of computing experts shares.

index_TK ──▶ sort ──▶ rows of expert 0 | rows of expert 1 | ... ──▶ unsort ──▶ weighted sum over K
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SortedRows(NamedTuple):
    """Which (token, k) pair stands where once the pairs are sorted by expert.

    Attributes:
        order_N: For each sorted row, its position in the flattened ``index_TK``; int64, N = T * K.
        expert_N: For each sorted row, its expert; non-decreasing.
        ends_E: For each expert, the end of its rows (exclusive); int32. The start is the end before
            it.
    """

    order_N: Tensor
    expert_N: Tensor
    ends_E: Tensor


def sort_by_expert(index_TK: Tensor, num_experts: int) -> SortedRows:
    """Sort (token, k) pairs by expert, stably, without reading anything back to the host.

    Args:
        index_TK: Expert of each pair, in [0, num_experts); int64.
        num_experts: How many experts there are; experts without rows are legal.

    Returns:
        The sorted order.
    """
    expert_N, order_N = torch.sort(index_TK.reshape(-1), stable=True)
    counts_E = torch.zeros(num_experts, dtype=torch.int32, device=index_TK.device)
    counts_E.scatter_add_(0, expert_N, torch.ones_like(expert_N, dtype=torch.int32))
    return SortedRows(order_N, expert_N, counts_E.cumsum(0, dtype=torch.int32))


def weighted_combine(rows_ND: Tensor, weights_TK: Tensor, order_N: Tensor) -> Tensor:
    """Bring sorted rows back to their tokens and add them up by weight, always in the order of k.

    The fixed order of the sum keeps the answer independent of which expert came first.

    Args:
        rows_ND: Output of the experts for the sorted rows.
        weights_TK: Router weight of each pair.
        order_N: The order from :func:`sort_by_expert`.

    Returns:
        One weighted sum per token, ``[T, D]``.
    """
    num_tokens, top_k = weights_TK.shape
    position_N = torch.empty_like(order_N)
    position_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    weighted_ND = rows_ND[position_N] * weights_TK.reshape(-1, 1)
    return weighted_ND.view(num_tokens, top_k, rows_ND.shape[-1]).sum(dim=1)
