"""Layer search: copies of one layer's experts on slots, so that the busiest slot is done early.

First a greedy filling, then a local search from the busiest slot, then kicks: small random changes
(of a fixed seed) after which the local search may find something better. Equal input, equal result.

The copies of an expert share its rows equally here. At run time they are split so as to even out
the slots' loads, which can only be better than what is planned.
"""

from collections.abc import Iterator

import numpy as np

from moe_lightning.placement.layer_problem import (
    NEAR,
    Bools,
    LayerProblem,
    fill,
    lower_bound,
    split_time,
)

_GOOD = 1.002  # times the lower bound: no more kicks
_MAX_ELEMENTS = 200_000  # of a table of candidates
_TAKES_REPLICA = 0.4  # share of kicks


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
    time_S, share_E = problem.times(held_ES), problem.shares(held_ES)
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
    if min(best_move, best_swap) >= time_S[busy] * (1 - NEAR):
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
    time_S, num_E, load_E = problem.times(held_ES), held_ES.sum(axis=1), problem.load_E
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
    best, found = (time_S[busy] * (1 - NEAR), np.inf), None
    if np.isclose(time_S, time_S[busy], rtol=NEAR, atol=0).sum() > 1:
        # Others are as busy: the sum of squares tells whether this brings them closer to the rest.
        best = (time_S[busy] * (1 + NEAR), float((time_S**2).sum()) * (1 - NEAR))
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
        if value[0] < best[0] * (1 - NEAR) or (value[0] <= best[0] and value[1] < best[1]):
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
        lost_E = np.where(spare_ES.any(axis=1), problem.shares(held_ES), np.inf)
        expert = int(lost_E.argmin())
        time_S = np.where(spare_ES[expert], problem.times(held_ES), -np.inf)
        held_ES[expert, time_S.argmax()] = False


def search(problem: LayerProblem, *, num_kicks: int, start_ES: Bools | None = None) -> Bools:
    """Place the copies of a layer well.

    Args:
        problem: What is to be placed.
        num_kicks: Times to start the local search again from a changed placement.
        start_ES: Where to begin; by default what :func:`fill` makes.

    Returns:
        Whether a slot holds an expert, ``[E, S]``.
    """
    merged_ES, doubled_time = fill(problem, doubles="merged")
    starts = [fill(problem)[0], merged_ES] if start_ES is None else [start_ES]
    ends = [last(problem, held_ES) for held_ES in starts]
    best_ES = min(ends, key=lambda held_ES: float(problem.times(held_ES).max()))
    enough = lower_bound(problem) * _GOOD
    random = np.random.default_rng(0)
    best = float(problem.times(best_ES).max())
    for _ in range(num_kicks):
        if best <= enough or len(problem.speed_S) == 1:
            break
        held_ES = last(problem, _kicked(problem, best_ES, random))
        value = float(problem.times(held_ES).max())
        if value <= best:
            best, best_ES = value, held_ES
    # Two copies on one slot are a way to split rows 2 : 1, which equal shares do not know of; a run
    # splits rows as is best.
    if best > doubled_time * (1 + NEAR) and split_time(problem, best_ES) > doubled_time:
        return merged_ES
    return best_ES


def last(problem: LayerProblem, held_ES: Bools) -> Bools:
    """The placement from which no step leads on."""
    for step_ES in improve(problem, held_ES):
        held_ES = step_ES
    return held_ES


def _kicked(problem: LayerProblem, held_ES: Bools, random: np.random.Generator) -> Bools:
    """Swap copies with random others, the busiest slot's first, or give a replica away."""
    held_ES = held_ES.copy()
    busy = int(problem.times(held_ES).argmax())
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


def use_all_copies(problem: LayerProblem, held_ES: Bools) -> Bools:
    """Add copies where they do the least harm, until there are as many as there may be.

    The search stops short of that where one more copy does not help.

    Args:
        problem: What is placed; its limits leave no more room than the number of copies takes.
        held_ES: Where.

    Returns:
        The placement with all copies.
    """
    held_ES = held_ES.copy()
    while held_ES.sum() < problem.num_copies:
        is_open_S = held_ES.sum(axis=0) < problem.limit_S
        is_home_ES = problem.node_E[:, None] == problem.node_S
        best, found = np.inf, None
        for expert, slot in np.argwhere(~held_ES & is_open_S & is_home_ES).tolist():
            held_ES[expert, slot] = True
            value = float(problem.times(held_ES).max())
            held_ES[expert, slot] = False
            if value < best:
                best, found = value, (expert, slot)
        assert found is not None, "a slot with room lacks an expert"
        held_ES[found] = True
    return last(problem, held_ES)
