"""EPLB's convention for our planner: physical experts in order, as other engines read and write it.

DeepSeek's expert-parallelism load balancer (https://github.com/deepseek-ai/EPLB) numbers all copies
of a layer's experts, GPU after GPU:

    gpu          0        1
    physical   0  1  2  3  4  5          phy2log [0, 3, 1,  0, 2, 1]
    logical    0  3  1  0  2  1          log2phy [[0, 3], [2, 5], [4, -1], [1, -1]]
"""

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from moe_lightning.errors import UsageError
from moe_lightning.placement.layer_problem import Bools, Floats, Ints, LayerProblem
from moe_lightning.placement.layer_search import search, use_all_copies
from moe_lightning.placement.placement import ExpertPlacement
from moe_lightning.placement.planner import NUM_KICKS, PlanRequest, layer_problems


def rebalance_experts(
    weight: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Ints, Ints, Ints]:
    """Plan with EPLB's input and output, for any numbers, and never one expert twice on a GPU.

    Where ``num_gpus`` does not divide ``num_replicas``, the first GPUs hold one copy more, as
    ``numpy.array_split`` would have it. With fewer groups than nodes, or groups that do not fit on
    nodes evenly enough, nodes are not looked at.

    Args:
        weight: Load of each expert, ``[L, E]``.
        num_replicas: Physical experts of a layer: all copies, the first of each included.
        num_groups: Groups of neighbouring experts that stay on one node.
        num_nodes: Machines.
        num_gpus: GPUs of all machines, machine after machine.

    Returns:
        The logical expert of each physical one ``[L, R]``; the physical ones of each logical expert
        ``[L, E, X]``, padded with -1; and their number ``[L, E]``.

    Raises:
        UsageError: If there are too few physical experts, or more than every GPU could hold.
    """
    weight_LE = np.asarray(weight, dtype=np.float64)
    num_layers, num_experts = weight_LE.shape
    if not num_experts <= num_replicas <= num_experts * num_gpus:
        raise UsageError(
            f"num_replicas is {num_replicas}, but {num_experts} experts on {num_gpus} GPUs have "
            f"{num_experts} copies at least, and {num_experts * num_gpus} at most."
        )
    request = PlanRequest(
        num_gpus, num_replicas - num_experts, num_nodes=num_nodes, num_groups=num_groups
    )
    request.check(has_current=False, has_together=False)
    size_S = np.array([len(part) for part in np.array_split(np.arange(num_replicas), num_gpus)])
    phy2log_LR = np.empty((num_layers, num_replicas), np.int64)
    for layer, load_E in enumerate(weight_LE):
        held_ES = _place(load_E, request, size_S)
        # Nonzero of the transpose: GPU after GPU, experts ascending.
        phy2log_LR[layer] = np.nonzero(held_ES.T)[1]
    logcnt_LE = np.stack([np.bincount(row_R, minlength=num_experts) for row_R in phy2log_LR])
    log2phy_LEX = np.full((num_layers, num_experts, int(logcnt_LE.max())), -1, np.int64)
    for layer, row_R in enumerate(phy2log_LR):
        for expert in range(num_experts):
            places = np.flatnonzero(row_R == expert)
            log2phy_LEX[layer, expert, : len(places)] = places
    return phy2log_LR, log2phy_LEX, logcnt_LE


def from_physical(phy2log: ArrayLike, num_gpus: int) -> ExpertPlacement:
    """Read EPLB's order of physical experts.

    >>> from_physical([[0, 3, 1, 0, 2, 1]], 2).slots
    {0: ((0, 1), (0, 1), (1,), (0,))}

    Args:
        phy2log: The logical expert of each physical one, ``[L, R]``; -1 is an empty place.
        num_gpus: GPUs; the first of them hold one place more if ``R`` is not a multiple.

    Returns:
        The placement, layers from 0; two copies on one GPU become one.

    Raises:
        UsageError: If an expert is nowhere.
    """
    layers = {}
    for layer, row_R in enumerate(np.asarray(phy2log, dtype=np.int64)):
        holders: list[set[int]] = [set() for _ in range(row_R.max() + 1)]
        for slot, part in enumerate(np.array_split(row_R, num_gpus)):
            for expert in part[part >= 0].tolist():
                holders[expert].add(slot)
        layers[layer] = tuple(tuple(sorted(each)) for each in holders)
    return ExpertPlacement(num_gpus, layers)


def to_physical(placement: ExpertPlacement) -> Ints:
    """Write a placement in EPLB's order: as many places on each GPU as the fullest one needs.

    Args:
        placement: The placement.

    Returns:
        The logical expert of each place, ``[L, R]``, layers in ascending order; -1 is an empty
        place.
    """
    held = [
        [placement.experts_of(slot, layer) for slot in range(placement.num_slots)]
        for layer in placement.layers
    ]
    size = max((len(experts) for layer in held for experts in layer), default=0)
    rows = [
        [expert for experts in layer for expert in (*experts, *[-1] * (size - len(experts)))]
        for layer in held
    ]
    return np.array(rows, dtype=np.int64).reshape(len(held), size * placement.num_slots)


def _place(load_E: Floats, request: PlanRequest, size_S: Ints) -> Bools:
    ends = []
    for problem in layer_problems(load_E, request):
        exact = replace(problem, limit_S=size_S)
        held_ES = _full(exact)
        if held_ES is not None:
            ends.append((float(exact.times(held_ES).max()), held_ES))
    if not ends:
        alone = LayerProblem.of(load_E, int(size_S.sum()), np.ones(len(size_S)), size_S)
        held_ES = _full(alone)
        assert held_ES is not None, "without nodes any expert can go anywhere"
        return held_ES
    return min(ends, key=lambda end: end[0])[1]


def _full(problem: LayerProblem) -> Bools | None:
    """A placement that fills every GPU; None if nodes are too small or too large for that."""
    for node in range(problem.node_S.max() + 1):
        here_S, num_here = problem.node_S == node, int((problem.node_E == node).sum())
        size = int(problem.limit_S[here_S].sum())
        if not num_here <= size or problem.limit_S[here_S].max() > num_here:
            return None
    return use_all_copies(problem, search(problem, num_kicks=NUM_KICKS))
