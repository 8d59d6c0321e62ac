"""What can be said of a router's choices. Pure functions; nothing is read from the device."""

from typing import Literal

import torch
from torch import Tensor

ImbalanceKind = Literal["max_over_mean", "cv"]


def expert_load(index_TK: Tensor, num_experts: int) -> Tensor:
    """Count the rows of every expert; a row is one (token, expert) pair.

    >>> expert_load(torch.tensor([[0, 2], [2, 1]]), 4)
    tensor([1, 1, 2, 0])

    Args:
        index_TK: Chosen experts, any shape, integers. Numbers that are no expert are not counted,
            so padding may be marked by -1 or by the number of experts.
        num_experts: E.

    Returns:
        ``[E]`` int64, on the same device.
    """
    index_N = index_TK.reshape(-1).to(torch.int64)
    is_expert_N = (index_N >= 0) & (index_N < num_experts)
    index_N = torch.where(is_expert_N, index_N, num_experts)
    counts_E1 = torch.zeros(num_experts + 1, dtype=torch.int64, device=index_N.device)
    return counts_E1.scatter_add_(0, index_N, torch.ones_like(index_N))[:num_experts]


def load_imbalance(load_E: Tensor, kind: ImbalanceKind = "max_over_mean") -> Tensor:
    """How unevenly rows are spread.

    >>> load_imbalance(torch.tensor([6, 1, 1, 0]))
    tensor(3.)

    Args:
        load_E: Rows of every expert (or slot); more dimensions before are kept.
        kind: ``max_over_mean``, the busiest expert's load over the mean: how much longer a step
            takes than it would if all had the same, where each expert is on a device of its own.
            ``cv``, the coefficient of variation: the (population) standard deviation over the mean.

    Returns:
        float32. Without any rows 1 (``max_over_mean``) or 0 (``cv``).
    """
    load_E = load_E.to(torch.float64)
    mean = load_E.mean(-1)
    if kind == "max_over_mean":
        ratio, even = load_E.amax(-1) / mean, 1.0
    elif kind == "cv":
        ratio, even = load_E.std(-1, correction=0) / mean, 0.0
    else:
        raise ValueError(f"kind={kind!r}, but it must be max_over_mean or cv.")
    return torch.where(mean > 0, ratio, even).to(torch.float32)


def router_entropy(load_E: Tensor, *, normalise: bool = True) -> Tensor:
    """Entropy of the experts' shares of the rows.

    >>> router_entropy(torch.tensor([5, 5, 0, 0]))
    tensor(0.5000)

    Args:
        load_E: Rows of every expert, or probabilities; more dimensions before are kept.
        normalise: Whether to divide by log E, so that 1 is even and 0 is one expert for all rows;
            otherwise it is in nats.

    Returns:
        float32. Without any rows, or with a single expert, it is that of even shares.
    """
    load_E = load_E.to(torch.float64)
    num_experts = load_E.shape[-1]
    total = load_E.sum(-1, keepdim=True)
    share_E = torch.where(total > 0, load_E / total, 1 / num_experts)
    nats: Tensor = torch.special.entr(share_E).sum(-1)
    if normalise:
        most = torch.tensor(float(num_experts)).log()
        nats = nats / most if num_experts > 1 else torch.ones_like(nats)
    return nats.to(torch.float32)


def expert_coactivation(index_TK: Tensor, num_experts: int) -> Tensor:
    """Count the tokens that chose both of two experts.

    >>> expert_coactivation(torch.tensor([[0, 2], [2, 1]]), 3)
    tensor([[1, 0, 1],
            [0, 1, 1],
            [1, 1, 2]])

    Args:
        index_TK: Chosen experts, ``[T, K]``, those of a token distinct. Numbers that are no expert
            are not counted.
        num_experts: E.

    Returns:
        ``[E, E]`` int64, symmetric; the diagonal is :func:`expert_load`.
    """
    index_TK = index_TK.to(torch.int64)
    is_expert_TK = (index_TK >= 0) & (index_TK < num_experts)
    is_pair_TKK = is_expert_TK[:, :, None] & is_expert_TK[:, None, :]
    pair_TKK = index_TK[:, :, None] * num_experts + index_TK[:, None, :]
    pair_TKK = torch.where(is_pair_TKK, pair_TKK, -1)
    return expert_load(pair_TKK, num_experts**2).view(num_experts, num_experts)
