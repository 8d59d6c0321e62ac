"""Planner: from recorded loads to a placement whose busiest slot has as little to do as can be.

    loads ──▶ layer by layer: nodes first, then slots ──▶ few moves, little traffic ──▶ placement

What is tried for a layer is in :mod:`moe_lightning.placement.layer_search`, what a placement costs
to change to in :mod:`moe_lightning.placement.few_moves`, and who is chosen with whom in
:mod:`moe_lightning.placement.coactivation`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import numpy as np

from moe_lightning.errors import UsageError
from moe_lightning.placement.coactivation import bring_together
from moe_lightning.placement.few_moves import from_current, num_moves, relabelled, within_budget
from moe_lightning.placement.layer_problem import Bools, Floats, Ints, LayerProblem, fill
from moe_lightning.placement.layer_search import last, search
from moe_lightning.placement.placement import ExpertPlacement

Objective = Literal["balance", "traffic"]
NUM_KICKS = 60
_SMALL = 40  # experts times slots; there kicks are cheap, and matter


@dataclass(frozen=True)
class PlanRequest:
    """What is asked of the planner.

    Attributes:
        num_slots: Number of slots.
        num_replicas: Copies beyond the first of each expert, in each layer; fewer are made where
            every slot has every expert.
        num_nodes: Machines that the slots are on, in order. All copies of an expert stay on one.
        num_groups: Groups of neighbouring experts that stay on one node together, for routers that
            choose groups first; None means that every expert is a group.
        slot_speeds: How fast each slot is, in any unit; None means equally fast.
        slack: How much worse than the best the balance may get to save moves or traffic: 0.02 is
            2 %.
        max_moves: Copies of experts at most, over all layers, that are put where ``current`` does
            not have them; None means any number.
        objective: ``balance``, or ``traffic`` to also bring together experts that are chosen
            together.
    """

    num_slots: int
    num_replicas: int = 0
    num_nodes: int = 1
    num_groups: int | None = None
    slot_speeds: Sequence[float] | None = None
    slack: float = 0.02
    max_moves: int | None = None
    objective: Objective = "balance"

    def check(self, *, has_current: bool, has_together: bool) -> None:
        """Refuse numbers that make no sense.

        Raises:
            UsageError: If one is out of range, or lacks what it needs.
        """
        at_least = {
            "slots": (self.num_slots, 1),
            "replicas": (self.num_replicas, 0),
            "nodes": (self.num_nodes, 1),
            "groups": (1 if self.num_groups is None else self.num_groups, 1),
            "slack": (self.slack, 0),
            "max_moves": (0 if self.max_moves is None else self.max_moves, 0),
        }
        for name, (value, least) in at_least.items():
            if not value >= least or not isfinite(value):
                raise UsageError(f"{name} is {value}, but it must be {least} or more.")
        if self.num_nodes > self.num_slots:
            raise UsageError(
                f"nodes is {self.num_nodes}, but there are {self.num_slots} slots: a node has one "
                "at least. Give the number of machines that the slots are on."
            )
        speeds = self.slot_speeds
        if speeds is not None and (
            len(speeds) != self.num_slots or not all(isfinite(s) and s > 0 for s in speeds)
        ):
            raise UsageError(
                f"slot_speeds is {list(speeds)}, but it must be {self.num_slots} numbers above 0, "
                "one for each slot."
            )
        if self.max_moves is not None and not has_current:
            raise UsageError(
                "max_moves has no meaning without a current placement: give the placement.json "
                "that is in use."
            )
        if self.objective == "traffic" and not has_together:
            raise UsageError(
                "The objective traffic needs to know which experts are chosen together, but the "
                "recording does not say. Record it (routing.npz), or use the objective balance."
            )
        if self.objective == "traffic" and self.max_moves is not None:
            raise UsageError(
                "The objective traffic moves as many experts as it likes, so it does not go "
                "together with max_moves. Leave one of them out."
            )


def plan_placement(
    loads: Mapping[int, Sequence[float]],
    request: PlanRequest,
    *,
    current: ExpertPlacement | None = None,
    together: Mapping[int, Ints] | None = None,
) -> ExpertPlacement:
    """Plan where the experts of a model go.

    >>> plan_placement({0: [12, 1, 4, 3]}, PlanRequest(2, num_replicas=1)).slots
    {0: ((0, 1), (1,), (0,), (1,))}

    Args:
        loads: Rows of each expert of each MoE layer.
        request: What is asked for.
        current: The placement that is in use, for as many slots. Of about equally good placements,
            one that has few experts elsewhere is taken.
        together: For each layer the rows that had both of two experts, ``[E, E]``, for the
            objective ``traffic``.

    Returns:
        The placement. In each layer a slot holds at most its share of the copies, rounded up;
        shares are equal, or in proportion to the speeds.

    Raises:
        UsageError: If the request makes no sense, or the current placement is another model's.
    """
    request.check(has_current=current is not None, has_together=bool(together))
    if current is not None:
        current.check({n: len(row) for n, row in loads.items()}, request.num_slots)
    problems, planned = {}, {}
    for layer, row in loads.items():
        variants = list(layer_problems(np.asarray(row, np.float64), request))
        ends = [
            (problem, search(problem, num_kicks=NUM_KICKS * _effort(problem)))
            for problem in variants
        ]
        problems[layer], planned[layer] = min(ends, key=lambda end: end[0].times(end[1]).max())
    if current is not None:
        have = {layer: to_held(current.slots[layer], request.num_slots) for layer in current.layers}
        planned = _with_few_moves(problems, planned, have, request)
    if request.objective == "traffic":
        assert together is not None, "checked above"
        for layer, held_ES in planned.items():
            planned[layer] = bring_together(
                problems[layer], held_ES, together[layer], slack=request.slack
            )
    return to_placement(planned, request.num_slots)


def layer_problems(load_E: Floats, request: PlanRequest) -> Iterable[LayerProblem]:
    """The layer's problem; on several nodes one for each way in which experts go to nodes.

    Args:
        load_E: Rows of each expert.
        request: What is asked for.
    """
    num_slots, num_nodes = request.num_slots, request.num_nodes
    speeds = request.slot_speeds or [1.0] * num_slots
    speed_S = np.asarray(speeds, np.float64)
    problem = LayerProblem.of(load_E, len(load_E) + request.num_replicas, speed_S)
    num_groups = min(request.num_groups or len(load_E), len(load_E))
    # With fewer groups than nodes, a node would be idle: EPLB ignores nodes then, and so do we.
    if num_nodes == 1 or num_groups < num_nodes:
        yield problem
        return
    group_E = np.arange(len(load_E)) * num_groups // len(load_E)
    node_S = np.arange(num_slots) * num_nodes // num_slots
    packing = LayerProblem.of(_sums(group_E, load_E), num_groups, _sums(node_S, speed_S))
    first, _ = fill(packing)
    for node_GN in (first, last(packing, first)):
        yield problem.on_nodes(node_GN.argmax(axis=1)[group_E], node_S)


def to_held(slots: Sequence[Sequence[int]], num_slots: int) -> Bools:
    """The slots of each expert as a table ``[E, S]``."""
    held_ES = np.zeros((len(slots), num_slots), np.bool_)
    for expert, holders in enumerate(slots):
        held_ES[expert, list(holders)] = True
    return held_ES


def to_placement(planned: Mapping[int, Bools], num_slots: int) -> ExpertPlacement:
    """The placement that tables ``[E, S]``, one a layer, say."""
    return ExpertPlacement(
        num_slots,
        {
            layer: tuple(tuple(np.flatnonzero(row_S).tolist()) for row_S in held_ES)
            for layer, held_ES in planned.items()
        },
    )


def _sums(place_N: Ints, value_N: Floats) -> Floats:
    """The sum of the values that belong to each place."""
    return np.bincount(place_N, value_N).astype(np.float64)


def _effort(problem: LayerProblem) -> int:
    return 5 if len(problem.load_E) * len(problem.speed_S) <= _SMALL else 1


def _with_few_moves(
    problems: Mapping[int, LayerProblem],
    planned: Mapping[int, Bools],
    have: Mapping[int, Bools],
    request: PlanRequest,
) -> dict[int, Bools]:
    good = {
        layer: float(problem.times(planned[layer]).max()) * (1 + request.slack)
        for layer, problem in problems.items()
    }
    if request.max_moves is not None:
        return within_budget(problems, have, max_moves=request.max_moves, good_enough=good)
    result = {}
    for layer, problem in problems.items():
        new_ES, have_ES = relabelled(problem, planned[layer], have[layer]), have[layer]
        *_, near_ES = from_current(problem, have_ES, good_enough=good[layer])
        fits = problem.times(near_ES).max() <= good[layer] and problem.allows(near_ES)
        saves = num_moves(near_ES, have_ES) <= num_moves(new_ES, have_ES)
        result[layer] = near_ES if fits and saves else new_ES
    return result
