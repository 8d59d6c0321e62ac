"""Layer problem: the copies of one layer's experts, the slots they may go to, and what is good.

Also the greedy filling that a search begins with (:mod:`moe_lightning.placement.layer_search`).
"""

from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NEAR = 1e-9  # relative; less is rounding
_MAX_SWEEPS = 50


@dataclass(frozen=True)
class LayerProblem:
    """What is to be placed, and where it may go.

    Attributes:
        load_E: Rows of each expert.
        num_copies: Copies at most, the first of each expert included.
        speed_S: Speed of each slot; its time is its rows over its speed.
        limit_S: Experts at most on each slot.
        node_E: Node of each expert; its copies stay there.
        node_S: Node of each slot.
    """

    load_E: Floats
    num_copies: int
    speed_S: Floats
    limit_S: Ints
    node_E: Ints
    node_S: Ints

    @classmethod
    def of(
        cls, load_E: Floats, num_copies: int, speed_S: Floats, limit_S: Ints | None = None
    ) -> "LayerProblem":
        """The problem without nodes; by default slots hold experts in proportion to their speed."""
        num_experts, num_slots = len(load_E), len(speed_S)
        num_copies = min(num_copies, num_experts * num_slots)
        if limit_S is None:
            share_S = num_copies * speed_S / speed_S.sum()
            limit_S = np.ceil(share_S - NEAR * num_copies).astype(np.int64).clip(1, num_experts)
            while limit_S.sum() < num_copies:
                limit_S[np.where(limit_S < num_experts, limit_S, num_experts + 1).argmin()] += 1
        nodes = np.zeros(num_experts, np.int64), np.zeros(num_slots, np.int64)
        return cls(load_E, num_copies, speed_S, limit_S, *nodes)

    def on_nodes(self, node_E: Ints, node_S: Ints) -> "LayerProblem":
        """The problem with every expert bound to a node; limits grow where that needs it."""
        limit_S = self.limit_S.copy()
        for node in range(node_S.max() + 1):
            here_S = node_S == node
            if limit_S[here_S].sum() < (node_E == node).sum():
                limit_S[here_S] = -(-(node_E == node).sum() // here_S.sum())
        return replace(self, node_E=node_E, node_S=node_S, limit_S=limit_S)

    def allows(self, held_ES: Bools) -> bool:
        """Whether a placement keeps to the limits, the number of copies, and the nodes."""
        is_home_ES = self.node_E[:, None] == self.node_S
        return bool(
            (held_ES.sum(axis=0) <= self.limit_S).all()
            and held_ES.sum() <= self.num_copies
            and is_home_ES[held_ES].all()
        )

    def shares(self, held_ES: Bools) -> Floats:
        """Rows of each copy of each expert."""
        share_E: Floats = self.load_E / held_ES.sum(axis=1)
        return share_E

    def times(self, held_ES: Bools) -> Floats:
        """Rows over speed of each slot."""
        time: Floats = self.shares(held_ES) @ held_ES / self.speed_S
        return time


def num_copies_of(problem: LayerProblem) -> list[int]:
    """Copies of each expert: again and again one more of that with the most rows a copy.

    EPLB's ``replicate_experts``. It makes the largest rows a copy as small as can be.
    """
    copies = [1] * len(problem.load_E)
    room = [
        int(problem.limit_S[problem.node_S == node].sum() - (problem.node_E == node).sum())
        for node in range(problem.node_S.max() + 1)
    ]
    slots = np.bincount(problem.node_S).tolist()
    # Without load, the expert with the fewest copies.
    heap = [(-float(load), int(not load), e, 1) for e, load in enumerate(problem.load_E)]
    heapify(heap)
    left = problem.num_copies - len(copies)
    while heap and left > 0:
        _, turn, expert, num = heappop(heap)
        node = int(problem.node_E[expert])
        if num < slots[node] and room[node] > 0:
            copies[expert] = num + 1
            room[node] -= 1
            left -= 1
            share = float(problem.load_E[expert]) / (num + 1)
            heappush(heap, (-share, turn + int(not share), expert, num + 1))
    return copies


def fill(
    problem: LayerProblem, *, doubles: Literal["never", "merged"] = "never"
) -> tuple[Bools, float]:
    """Place copies greedily: largest first, each on the slot that would be done with it first.

    EPLB's ``balanced_packing``, without doubles.

    Args:
        problem: What is to be placed.
        doubles: Whether a second copy of an expert on a slot is placed elsewhere, or left out: then
            there are fewer copies than there may be.

    Returns:
        Whether a slot holds an expert, ``[E, S]``; and the busiest slot's time, to which a second
        copy adds as much as the first.
    """
    copies = num_copies_of(problem)
    share_E = problem.load_E / np.array(copies)
    held_ES = np.zeros((len(copies), len(problem.speed_S)), np.bool_)
    time_S, num_S = np.zeros(len(problem.speed_S)), np.zeros(len(problem.speed_S), np.int64)
    for expert in np.lexsort((np.arange(len(copies)), -share_E)).tolist():
        for _ in range(copies[expert]):
            open_S = (problem.node_S == problem.node_E[expert]) & (num_S < problem.limit_S)
            if doubles == "never":
                open_S &= ~held_ES[expert]
            if not open_S.any():
                slot = _make_room(problem, held_ES, num_S, expert)
                held_ES[expert, slot] = True
                num_S = held_ES.sum(axis=0)
                time_S = share_E @ held_ES / problem.speed_S
                continue
            after_S = np.where(open_S, time_S + share_E[expert] / problem.speed_S, np.inf)
            first_S = after_S <= after_S.min() * (1 + NEAR)
            slot = int(np.where(first_S, (num_S + 1) / problem.speed_S, np.inf).argmin())
            held_ES[expert, slot] = True
            num_S[slot] += 1
            time_S[slot] = after_S[slot]
    return held_ES, float(time_S.max())


def _make_room(problem: LayerProblem, held_ES: Bools, num_S: Ints, expert: int) -> int:
    """Where all slots with room have an expert already, let a full slot give another one away."""
    here_S = problem.node_S == problem.node_E[expert]
    open_slot = int(np.flatnonzero(here_S & (num_S < problem.limit_S))[0])
    for slot in np.flatnonzero(here_S & ~held_ES[expert]):
        other_E = np.flatnonzero(held_ES[:, slot] & ~held_ES[:, open_slot])
        if len(other_E):
            held_ES[other_E[-1], slot] = False
            held_ES[other_E[-1], open_slot] = True
            return int(slot)
    raise AssertionError("a full slot holds more experts than one with room")


def lower_bound(problem: LayerProblem) -> float:
    """A time that no placement can be better than, rows split equally over copies."""
    share = float((problem.load_E / np.array(num_copies_of(problem))).max(initial=0))
    num_nodes = problem.node_S.max() + 1
    load_N = np.bincount(problem.node_E, problem.load_E, minlength=num_nodes)
    mean_N = load_N / np.bincount(problem.node_S, problem.speed_S, minlength=num_nodes)
    return max(float(mean_N.max()), share / float(problem.speed_S.max()))


def split_time(problem: LayerProblem, held_ES: Bools) -> float:
    """The busiest slot's time if the rows of an expert are split over its copies as is best.

    Expert after expert, its rows fill up its slots from the one that is done first, again and again
    until nothing changes. This lowers the sum of squared loads to its minimum, and no split has a
    smaller maximum than that one. A run does the same once for each pass of a layer.

    Args:
        problem: What is placed.
        held_ES: Where.

    Returns:
        The time.
    """
    num_E = held_ES.sum(axis=1)
    rows_ES = problem.shares(held_ES)[:, None] * held_ES
    time_S = rows_ES.sum(axis=0) / problem.speed_S
    several = [e for e in np.argsort(-problem.load_E, kind="stable") if num_E[e] > 1]
    before = np.inf
    for _ in range(_MAX_SWEEPS):
        now = float(time_S.max())
        if now >= before * (1 - 1e-6):
            break
        before = now
        for expert in several:
            slots = np.flatnonzero(held_ES[expert])
            speed_N = problem.speed_S[slots]
            other_N = time_S[slots] - rows_ES[expert, slots] / speed_N
            order = np.argsort(other_N, kind="stable")
            # The level to which the rows fill the first n slots, and the n for which it is one.
            speed, work = np.cumsum(speed_N[order]), np.cumsum((other_N * speed_N)[order])
            level = float(((problem.load_E[expert] + work) / speed).min())
            rows_N = np.maximum(level - other_N, 0) * speed_N
            rows_ES[expert, slots] = rows_N
            time_S[slots] = other_N + rows_N / speed_N
    return float(time_S.max())
