"""Co-activation: which experts a token chooses together, and how many slots its row must go to.

A row travels once to each slot that has one of its experts, so experts that are often chosen
together belong on one slot. Pairs of experts are all that is recorded. For two experts a token they
say exactly how many slots a row goes to; for more they do not (of three experts on a slot, the
three pairs may come from the same rows or from others), and :func:`slots_per_row` gives an
estimate that is never too small.
"""

import numpy as np

from moe_lightning.placement.layer_problem import NEAR, Bools, Floats, Ints, LayerProblem

_MAX_SWEEPS = 20


def bring_together(
    problem: LayerProblem, held_ES: Bools, together_EE: Ints, *, slack: float
) -> Bools:
    """Swap copies so that experts which are chosen together share a slot.

    What is raised is the number of (row, pair of its experts) whose pair is on one slot.

    Args:
        problem: What is placed.
        held_ES: Where, balanced.
        together_EE: Rows that had both experts.
        slack: How much more than now the busiest slot may get to do.

    Returns:
        The placement; every slot holds as many experts as before.
    """
    held_ES = held_ES.copy()
    share_E, node_S, speed_S = problem.shares(held_ES), problem.node_S, problem.speed_S
    time_S = problem.times(held_ES)
    most = float(time_S.max()) * (1 + slack)
    pairs_EE = together_EE.astype(np.float64)
    np.fill_diagonal(pairs_EE, 0)
    # Of an expert's rows each copy gets an equal share.
    part_E = 1 / held_ES.sum(axis=1)
    friends_ES = pairs_EE @ (held_ES * part_E[:, None])
    for _ in range(_MAX_SWEEPS):
        num_swaps = 0
        for expert, slot in np.argwhere(held_ES).tolist():
            other_P, slot_P = np.nonzero(held_ES)
            more_P = share_E[other_P] - share_E[expert]
            ok_P = ~held_ES[other_P, slot] & ~held_ES[expert, slot_P]
            ok_P &= node_S[slot_P] == node_S[slot]
            ok_P &= time_S[slot] + more_P / speed_S[slot] <= most
            ok_P &= time_S[slot_P] - more_P / speed_S[slot_P] <= most
            gain_P = part_E[expert] * (friends_ES[expert, slot_P] - friends_ES[expert, slot])
            gain_P += part_E[other_P] * (friends_ES[other_P, slot] - friends_ES[other_P, slot_P])
            gain_P -= 2 * part_E[expert] * part_E[other_P] * pairs_EE[expert, other_P]
            gain_P[~ok_P] = -np.inf
            best = int(gain_P.argmax())
            if not held_ES[expert, slot] or gain_P[best] <= NEAR * max(1.0, pairs_EE.max()):
                continue
            other, to = int(other_P[best]), int(slot_P[best])
            held_ES[expert, slot] = held_ES[other, to] = False
            held_ES[expert, to] = held_ES[other, slot] = True
            moved_E = part_E[other] * pairs_EE[:, other] - part_E[expert] * pairs_EE[:, expert]
            friends_ES[:, slot] += moved_E
            friends_ES[:, to] -= moved_E
            time_S = problem.times(held_ES)
            num_swaps += 1
        if not num_swaps:
            break
    return held_ES


def slots_per_row(held_ES: Bools, together_EE: Ints) -> float:
    """Estimate how many slots a token's row goes to, from pairs alone.

    The rows that reach a slot are those of its experts, less what they share. Counted is what a
    tree of pairs shares at most (Hunter 1976): exact for two experts a token, or where no three of
    a token's experts are on one slot; otherwise never too small. The rows of an expert with copies
    are split equally and independently.

    Args:
        held_ES: The placement.
        together_EE: Rows that had both experts; on the diagonal all rows of an expert.

    Returns:
        Slots per row; 0 if there are no rows.
    """
    rows_E = together_EE.diagonal().astype(np.float64)
    pairs_EE = together_EE.astype(np.float64)
    np.fill_diagonal(pairs_EE, 0)
    if not rows_E.sum():
        return 0.0
    top_k = 1 + pairs_EE.sum() / rows_E.sum()
    part_ES = held_ES / held_ES.sum(axis=1, keepdims=True)
    visits = 0.0
    for slot in range(held_ES.shape[1]):
        experts = np.flatnonzero(held_ES[:, slot])
        part_N = part_ES[experts, slot]
        both_NN = pairs_EE[np.ix_(experts, experts)] * np.outer(part_N, part_N)
        visits += float(part_N @ rows_E[experts]) - _heaviest_tree(both_NN)
    return float(visits / (rows_E.sum() / top_k))


def _heaviest_tree(weight_NN: Floats) -> float:
    """The weight of the heaviest tree that joins all nodes (Prim 1957)."""
    if len(weight_NN) < 2:
        return 0.0
    link_N, is_in_N, total = weight_NN[0].copy(), np.zeros(len(weight_NN), np.bool_), 0.0
    is_in_N[0] = True
    for _ in range(len(weight_NN) - 1):
        best = int(np.where(is_in_N, -1.0, link_N).argmax())
        total += float(link_N[best])
        is_in_N[best] = True
        link_N = np.maximum(link_N, weight_NN[best])
    return total
