"""Gradients of experts that several ranks hold.

ep rank 0: experts 0 1 2        expert 2 has rows on both ranks, and so a gradient on both:
ep rank 1: experts 2 3          the sum goes to both, and the copies stay equal
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from moe_lightning.collectives import RankGroup
from moe_lightning.finetune.local_parts import local_box, local_part
from moe_lightning.modeling.expert_rows import ExpertRows


def local_expert_ids(parameter: Tensor, rows: ExpertRows) -> tuple[int, ...]:
    """The logical experts of the rows that this rank itself holds of a parameter.

    Args:
        parameter: A parameter with one row per expert, which FSDP may shard along dim 0.
        rows: What its rows are.

    Returns:
        The expert of each row of dim 0 of this rank's piece.
    """
    ids = rows.expert_ids[local_box(parameter)[0]]
    assert len(ids) == local_part(parameter).shape[0], "the rows are cut in a way not known here"
    return ids


@torch.no_grad()
def sum_replica_gradients(
    parameters: Iterable[tuple[str, Tensor]],
    rows: Mapping[str, ExpertRows],
    num_holders: Mapping[str, Sequence[int]],
    *,
    group: RankGroup,
) -> None:
    """Give every copy of an expert the sum of the gradients of all its copies, in place.

    All ranks of the group call this together, after the gradients are reduced and before they are
    clipped. It sends one row for each expert that has copies, and nothing if none has.

    Args:
        parameters: Names and parameters of the model; those in ``rows`` count.
        rows: What the rows of parameters are.
        num_holders: For each of these parameters and each logical expert, on how many places along
            ``ep`` it is.
        group: The ranks that share one copy of the experts and its replicas: ``efsdp * ep``.
    """
    for name, parameter in parameters:
        if name not in rows or not parameter.requires_grad:
            continue
        replicated = [expert for expert, n in enumerate(num_holders[name]) if n > 1]
        if not replicated:
            continue
        if parameter.grad is None:  # no row reached this rank's copy; others may have had some
            parameter.grad = torch.zeros_like(parameter)
        grad = local_part(parameter.grad)
        slot = {expert: n for n, expert in enumerate(replicated)}
        ids = local_expert_ids(parameter, rows[name])
        here = torch.tensor(
            [n for n, e in enumerate(ids) if e in slot], dtype=torch.int64, device=grad.device
        )
        there = torch.tensor(
            [slot[e] for e in ids if e in slot], dtype=torch.int64, device=grad.device
        )
        sums = grad.new_zeros((len(replicated), *grad.shape[1:]))
        sums.index_copy_(0, there, grad[here])
        grad.index_copy_(0, here, group.sum(sums)[there])


def row_copies(parameter: Tensor, rows: ExpertRows, num_holders: Sequence[int]) -> Tensor:
    """How many places along ``ep`` hold each row of this rank's piece of a parameter.

    Args:
        parameter: A parameter with one row per expert.
        rows: What its rows are.
        num_holders: For each logical expert, on how many places along ``ep`` it is.

    Returns:
        One number for each row, int64 on the parameter's device.
    """
    ids = local_expert_ids(parameter, rows)
    counts = [num_holders[expert] for expert in ids]
    return torch.tensor(counts, dtype=torch.int64, device=local_part(parameter).device)
