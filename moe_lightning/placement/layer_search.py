"""Layer search: copies of one layer's experts on slots, so that the busiest slot is done early.

First a greedy filling, then a local search from the busiest slot, then kicks: small random changes
(of a fixed seed) after which the local search may find something better. Equal input, equal result.

The copies of an expert share its rows equally here. At run time they are split so as to even out
the slots' loads, which can only be better than what is planned.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_NEAR = 1e-9  # relative; less is rounding
_GOOD = 1.002  # times the lower bound: no more kicks
_MAX_ELEMENTS = 200_000  # of a table of candidates
_TAKES_REPLICA = 0.4  # share of kicks


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
            limit_S = np.ceil(share_S - _NEAR * num_copies).astype(np.int64).clip(1, num_experts)
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

    def share_E(self, held_ES: Bools) -> Floats:
        """Rows of each copy of each expert."""
        return self.load_E / held_ES.sum(axis=1)

    def time_S(self, held_ES: Bools) -> Floats:
        """Rows over speed of each slot."""
        time: Floats = self.share_E(held_ES) @ held_ES / self.speed_S
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
    heap = [(-float(load), 1, expert) for expert, load in enumerate(problem.load_E)]
    heapify(heap)
    left = problem.num_copies - len(copies)
    while heap and left > 0:
        _, num, expert = heappop(heap)
        node = int(problem.node_E[expert])
        if num < slots[node] and room[node] > 0:
            copies[expert] = num + 1
            room[node] -= 1
            left -= 1
            heappush(heap, (-float(problem.load_E[expert]) / (num + 1), num + 1, expert))
    return copies


def fill(problem: LayerProblem, *, doubles: Literal["never", "merged"] = "never") -> Bools:
    """Place copies greedily: largest first, each on the slot that would be done with it first.

    EPLB's ``balanced_packing``, without doubles.

    Args:
        problem: What is to be placed.
        doubles: Whether a second copy of an expert on a slot is placed elsewhere, or left out: then
            there are fewer copies than there may be.

    Returns:
        Whether a slot holds an expert, ``[E, S]``.
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
            first_S = after_S <= after_S.min() * (1 + _NEAR)
            slot = int(np.where(first_S, (num_S + 1) / problem.speed_S, np.inf).argmin())
            held_ES[expert, slot] = True
            num_S[slot] += 1
            time_S[slot] = after_S[slot]
    return held_ES


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


def improve(problem: LayerProblem, held_ES: Bools) -> Iterator[Bools]:
    """Take load off the busiest slot, step by step, until no step does.

    A step moves a copy, swaps two, or takes a replica from one expert and gives it to another.

    Args:
        problem: What is placed.
        held_ES: Where; it is not changed.

    Yields:
        The placement after each step; from step to step the busiest slots have less to do.
    """
    for _ in range(20 * held_ES.sum()):
        step = _move_or_swap(problem, held_ES)
        if step is None:
            step = _give_replica(problem, held_ES)
        if step is None:
            return
        held_ES = step
        yield held_ES


def _move_or_swap(problem: LayerProblem, held_ES: Bools) -> Bools | None:
    time_S, share_E = problem.time_S(held_ES), problem.share_E(held_ES)
    busy = int(time_S.argmax())
    own_N = np.flatnonzero(held_ES[:, busy] & (share_E > 0))
    if not len(own_N):
        return None
    node_S, speed_S = problem.node_S, problem.speed_S
    here_S = (node_S == node_S[busy]) & (np.arange(len(speed_S)) != busy)
    # Moves.
    free_S = here_S & (held_ES.sum(axis=0) < problem.limit_S)
    moved_N = share_E[own_N, None]
    after_NS = np.maximum(time_S[busy] - moved_N / speed_S[busy], time_S + moved_N / speed_S)
    after_NS[~free_S[None, :] | held_ES[own_N]] = np.inf
    # Swaps.
    other_P, slot_P = np.nonzero(held_ES & here_S & ~held_ES[:, busy, None])
    more_NP = share_E[other_P] - moved_N
    after_NP = np.maximum(
        time_S[busy] + more_NP / speed_S[busy], time_S[slot_P] - more_NP / speed_S[slot_P]
    )
    after_NP[held_ES[own_N[:, None], slot_P[None, :]]] = np.inf
    best_move, best_swap = after_NS.min(initial=np.inf), after_NP.min(initial=np.inf)
    if min(best_move, best_swap) >= time_S[busy] * (1 - _NEAR):
        return None
    held_ES = held_ES.copy()
    if best_move <= best_swap:
        own, slot = np.unravel_index(after_NS.argmin(), after_NS.shape)
    else:
        own, pair = np.unravel_index(after_NP.argmin(), after_NP.shape)
        slot = slot_P[pair]
        held_ES[other_P[pair], slot], held_ES[other_P[pair], busy] = False, True
    held_ES[own_N[own], busy], held_ES[own_N[own], slot] = False, True
    return held_ES


def _give_replica(problem: LayerProblem, held_ES: Bools) -> Bools | None:
    """One more copy of an expert, in a free place or in that of another's replica."""
    time_S, num_E, load_E = problem.time_S(held_ES), held_ES.sum(axis=1), problem.load_E
    speed_S, num_S = problem.speed_S, held_ES.sum(axis=0)
    busy = int(time_S.argmax())
    # Places: (what leaves, where); nothing leaves where there is room and a copy to spare.
    gone_P, slot_P = np.nonzero(held_ES & (num_E > 1)[:, None])
    base_PS = np.repeat(time_S[None, :], len(gone_P), axis=0)
    old_P, new_P = load_E[gone_P] / num_E[gone_P], load_E[gone_P] / (num_E[gone_P] - 1)
    base_PS += held_ES[gone_P] * ((new_P - old_P)[:, None] / speed_S)
    base_PS[np.arange(len(gone_P)), slot_P] -= new_P / speed_S[slot_P]
    if num_E.sum() < problem.num_copies:
        free = np.flatnonzero(num_S < problem.limit_S)
        gone_P, slot_P = np.append(gone_P, np.full(len(free), -1)), np.append(slot_P, free)
        base_PS = np.concatenate([base_PS, np.repeat(time_S[None, :], len(free), axis=0)])
    if not len(gone_P):
        return None
    is_small = base_PS.size * len(load_E) <= _MAX_ELEMENTS
    takers = np.flatnonzero(load_E > 0 if is_small else held_ES[:, busy] & (load_E > 0))
    best, found = (time_S[busy] * (1 - _NEAR), np.inf), None
    if np.isclose(time_S, time_S[busy], rtol=_NEAR, atol=0).sum() > 1:
        # Others are as busy: the sum of squares tells whether this brings them closer to the rest.
        best = (time_S[busy] * (1 + _NEAR), float((time_S**2).sum()) * (1 - _NEAR))
    for taker in takers:
        ok_P = ~held_ES[taker, slot_P] & (problem.node_S[slot_P] == problem.node_E[taker])
        if not ok_P.any():
            continue
        new = load_E[taker] / (num_E[taker] + 1)
        after_PS = base_PS[ok_P] + held_ES[taker] * (new - load_E[taker] / num_E[taker]) / speed_S
        after_PS[np.arange(len(after_PS)), slot_P[ok_P]] += new / speed_S[slot_P[ok_P]]
        max_P, squares_P = after_PS.max(axis=1), (after_PS**2).sum(axis=1)
        first = int(np.lexsort((squares_P, max_P))[0])
        value = (float(max_P[first]), float(squares_P[first]))
        if value[0] < best[0] * (1 - _NEAR) or (value[0] <= best[0] and value[1] < best[1]):
            best, found = value, (taker, np.flatnonzero(ok_P)[first])
    if found is None:
        return None
    taker, place = found
    held_ES = held_ES.copy()
    if gone_P[place] >= 0:
        held_ES[gone_P[place], slot_P[place]] = False
    held_ES[taker, slot_P[place]] = True
    return held_ES


def drop_surplus(problem: LayerProblem, held_ES: Bools) -> Bools:
    """Drop replicas beyond the number of copies and the limits of slots, those that matter least.

    Returns:
        The placement without them. A slot that is too full with single experts stays so.
    """
    held_ES = held_ES.copy()
    while True:
        over_S = held_ES.sum(axis=0) > problem.limit_S
        is_surplus = held_ES.sum() > problem.num_copies
        spare_ES = held_ES & (held_ES.sum(axis=1) > 1)[:, None] & (over_S | is_surplus)
        if not spare_ES.any():
            return held_ES
        lost_E = np.where(spare_ES.any(axis=1), problem.share_E(held_ES), np.inf)
        expert = int(lost_E.argmin())
        time_S = np.where(spare_ES[expert], problem.time_S(held_ES), -np.inf)
        held_ES[expert, time_S.argmax()] = False


def lower_bound(problem: LayerProblem) -> float:
    """A time that no placement can be better than, rows split equally over copies."""
    share = float((problem.load_E / np.array(num_copies_of(problem))).max(initial=0))
    mean = float(problem.load_E.sum() / problem.speed_S.sum())
    return max(mean, share / float(problem.speed_S.max()))


def search(problem: LayerProblem, *, num_kicks: int, start_ES: Bools | None = None) -> Bools:
    """Place the copies of a layer well.

    Args:
        problem: What is to be placed.
        num_kicks: Times to start the local search again from a changed placement.
        start_ES: Where to begin; by default what :func:`fill` makes.

    Returns:
        Whether a slot holds an expert, ``[E, S]``.
    """
    starts = [fill(problem), fill(problem, doubles="merged")] if start_ES is None else [start_ES]
    ends = [last(problem, held_ES) for held_ES in starts]
    best_ES = min(ends, key=lambda held_ES: float(problem.time_S(held_ES).max()))
    enough = lower_bound(problem) * _GOOD
    random = np.random.default_rng(0)
    best = float(problem.time_S(best_ES).max())
    for _ in range(num_kicks):
        if best <= enough or len(problem.speed_S) == 1:
            break
        held_ES = last(problem, _kicked(problem, best_ES, random))
        value = float(problem.time_S(held_ES).max())
        if value <= best:
            best, best_ES = value, held_ES
    return best_ES


def last(problem: LayerProblem, held_ES: Bools) -> Bools:
    """The placement from which no step leads on."""
    for step_ES in improve(problem, held_ES):
        held_ES = step_ES
    return held_ES


def _kicked(problem: LayerProblem, held_ES: Bools, random: np.random.Generator) -> Bools:
    """Swap copies with random others, the busiest slot's first, or give a replica away."""
    held_ES = held_ES.copy()
    busy = int(problem.time_S(held_ES).argmax())
    node_S = problem.node_S
    for number in range(int(random.integers(1, 4))):
        expert_P, slot_P = np.nonzero(held_ES)
        spare_P = np.flatnonzero(held_ES.sum(axis=1)[expert_P] > 1)
        if len(spare_P) and random.random() < _TAKES_REPLICA:
            gone = random.choice(spare_P)
            slot = slot_P[gone]
            held_ES[expert_P[gone], slot] = False
            taker_E = np.flatnonzero(~held_ES[:, slot] & (problem.node_E == node_S[slot]))
            held_ES[random.choice(taker_E), slot] = True
            continue
        mine_P = np.flatnonzero(slot_P == busy) if number == 0 else np.arange(len(slot_P))
        if not len(mine_P):
            continue
        a = int(random.choice(mine_P))
        ok_P = ~held_ES[expert_P, slot_P[a]] & ~held_ES[expert_P[a], slot_P]
        ok_P &= node_S[slot_P] == node_S[slot_P[a]]
        if ok_P.any():
            b = int(random.choice(np.flatnonzero(ok_P)))
            held_ES[expert_P[a], slot_P[a]] = held_ES[expert_P[b], slot_P[b]] = False
            held_ES[expert_P[a], slot_P[b]] = held_ES[expert_P[b], slot_P[a]] = True
    return held_ES
