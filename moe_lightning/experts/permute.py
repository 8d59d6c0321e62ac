"""Rows sorted by expert, and back: the one permutation that every way of computing experts shares.

index_TK ──▶ sort ──▶ rows of expert 0 | rows of expert 1 | ... ──▶ unsort ──▶ weighted sum over K
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SortedRows(NamedTuple):
    """Which (token, k) pair stands where once the pairs are sorted by expert.

    Pairs whose expert is elsewhere (id = number of experts) come last. On a CPU they are cut off;
    on a GPU, where their number is not known without a synchronisation, they stay.

    Attributes:
        order_N: For each sorted row, its position in the flattened ``index_TK``; int64, N <= T * K.
        expert_N: For each sorted row, its expert; non-decreasing.
        ends_E: For each expert, the end of its rows (exclusive); int32. The start is the end before
            it.
    """

    order_N: Tensor
    expert_N: Tensor
    ends_E: Tensor


def sort_by_expert(index_TK: Tensor, num_experts: int) -> SortedRows:
    """Sort (token, k) pairs by expert, stably, without reading anything back from a GPU.

    Args:
        index_TK: Expert of each pair, in [0, num_experts]; int64. The value num_experts means that
            the pair is computed elsewhere.
        num_experts: How many experts there are; experts without rows are legal.

    Returns:
        The sorted order.
    """
    expert_N, order_N = torch.sort(index_TK.reshape(-1), stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=index_TK.device)
    counts.scatter_add_(0, expert_N, torch.ones_like(expert_N, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int32)
    if index_TK.device.type == "cpu" and counts[-1] > 0:
        num_here = order_N.numel() - int(counts[-1])
        order_N, expert_N = order_N[:num_here], expert_N[:num_here]
    return SortedRows(order_N, expert_N, ends[:-1])


def weighted_combine(rows_ND: Tensor, weights_TK: Tensor, rows: SortedRows) -> Tensor:
    """Bring sorted rows back to their tokens and add them up by weight, always in the order of k.

    The fixed order of the sum keeps the answer independent of which expert came first.

    Args:
        rows_ND: Output of the experts for the sorted rows; what stands in rows of experts elsewhere
            does not matter.
        weights_TK: Router weight of each pair.
        rows: What :func:`sort_by_expert` gave.

    Returns:
        One weighted sum per token, ``[T, D]``; pairs elsewhere add nothing.
    """
    num_tokens, top_k = weights_TK.shape
    num_pairs = num_tokens * top_k
    num_sorted = rows.order_N.numel()
    if num_sorted < num_pairs:
        weighted_ND = rows_ND * weights_TK.reshape(-1)[rows.order_N, None]
        pairs_ND = weighted_ND.new_zeros(num_pairs, rows_ND.shape[-1])
        pairs_ND = pairs_ND.index_copy(0, rows.order_N, weighted_ND)
    else:
        position_N = torch.empty_like(rows.order_N)
        position_N[rows.order_N] = torch.arange(num_sorted, device=rows.order_N.device)
        pairs_ND = rows_ND[position_N] * weights_TK.reshape(-1, 1)
    return pairs_ND.view(num_tokens, top_k, rows_ND.shape[-1]).sum(dim=1)
