"""Which experts are wrong, told from the sums of rows that several experts have added to.

A row whose sum is right clears every expert that it went to (in the slot that computed it, for a
replica may be wrong alone). Of the experts that are left, as few as explain all wrong rows are the
culprits. Where no such ones do, it is those whose rows are wrong most often.

    row 0: experts 1 4   right     clears 1 and 4
    row 1: experts 1 5   wrong     5 it is
    row 2: experts 5 7   wrong     explained by 5
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lightning.verification.differences import relative_differences
from moe_lightning.verification.hints import hint_of, telling_rows
from moe_lightning.verification.layer_rows import Compute, LayerRows, Unit

MATTERS = 0.1
"""Share of a row's sum from which on an expert would be seen in it."""
SAME_FACTOR = 1e-2
MOST_ALIKE = 0.3
LIKELY = 0.5
"""Share of wrong rows that makes an expert a culprit."""
MAX_LEFT = 0.01
"""Share of the wrong rows that may stay without a culprit."""


@dataclass(slots=True)
class Culprit:
    """Something that explains wrong rows.

    Attributes:
        units: The expert, in the slots where it is wrong; several experts if they cannot be told
            apart.
        num_rows: Positions that it explains.
        num_computed: Positions that went to it.
        relative: The largest relative difference among these.
        examples: Some of the positions, as row and place in it.
        hint: What is wrong with it, if that can be told; empty otherwise.
        right_elsewhere: Slots where the same expert is right.
    """

    units: tuple[Unit, ...]
    num_rows: int
    num_computed: int
    relative: float
    examples: tuple[tuple[int, int], ...]
    hint: str = ""
    right_elsewhere: tuple[int, ...] = ()


@dataclass(slots=True)
class Verdict:
    """Why a layer's sums are wrong.

    Attributes:
        factor: Least and largest factor, if every sum is right but for one; None otherwise.
        culprits: The experts that are wrong, the one that explains most first.
    """

    factor: tuple[float, float] | None
    culprits: list[Culprit]


def find_culprits(
    rows: LayerRows, compute: Compute, *, num_experts: int, tolerance: float
) -> Verdict:
    """Explain the wrong sums of a layer.

    Args:
        rows: The layer's rows; some of them are wrong.
        compute: The reference's experts.
        num_experts: Experts of the layer.
        tolerance: The largest relative difference that is right.

    Returns:
        The explanation.
    """
    wanted_TD, sizes_TK = _contributions(rows, compute)
    rel_T = relative_differences(rows.out_TD, wanted_TD)
    is_wrong_T = rel_T > tolerance
    factor = _common_factor(rows.out_TD, wanted_TD, is_wrong_T, tolerance)
    if factor is not None:
        return Verdict(factor, [])
    matters_TK = sizes_TK >= MATTERS * wanted_TD.float().norm(dim=1, keepdim=True)
    members = _members(rows, matters_TK)
    culprits = _explain(members, is_wrong_T, rel_T, rows)
    blamed = {unit for culprit in culprits for unit in culprit.units}
    for culprit in culprits:
        if len({unit.expert for unit in culprit.units}) == 1:
            probed = culprit.units[0].expert
            probes = telling_rows(probed, rows, blamed, is_wrong_T)
            limit = min(max(10 * tolerance, SAME_FACTOR), MOST_ALIKE)
            culprit.hint = hint_of(probed, rows, compute, probes, num_experts, limit)
        experts = {unit.expert for unit in culprit.units}
        culprit.right_elsewhere = tuple(
            sorted(u.slot for u in members if u.expert in experts and u not in blamed)
        )
    return Verdict(None, culprits)


def _contributions(rows: LayerRows, compute: Compute) -> tuple[Tensor, Tensor]:
    """The right sums, and how large each expert's part is."""
    total_TD, sizes = torch.zeros(rows.hidden_TD.shape), []
    for k in range(rows.index_TK.shape[1]):
        one = slice(k, k + 1)
        part_TD = compute(rows.hidden_TD, rows.index_TK[:, one], rows.weights_TK[:, one]).float()
        total_TD += part_TD
        sizes.append(part_TD.norm(dim=1))
    return total_TD, torch.stack(sizes, dim=1)


def _common_factor(
    out_TD: Tensor, wanted_TD: Tensor, is_wrong_T: Tensor, tolerance: float
) -> tuple[float, float] | None:
    """The factors between all sums and the right ones, if that is all that is wrong."""
    if not bool(is_wrong_T.all()) or len(is_wrong_T) < 2:
        return None
    out_TD, wanted_TD = out_TD.float(), wanted_TD.float()
    factor_T = (out_TD * wanted_TD).sum(1) / wanted_TD.square().sum(1).clamp(min=1e-30)
    rest_T = relative_differences(out_TD, factor_T[:, None] * wanted_TD)
    if bool((rest_T > max(tolerance, SAME_FACTOR)).any()):
        return None
    return float(factor_T.min()), float(factor_T.max())


def _members(rows: LayerRows, matters_TK: Tensor) -> dict[Unit, list[int]]:
    """The positions in which each unit has a part that matters."""
    members: dict[Unit, list[int]] = {}
    triples = zip(rows.index_TK.tolist(), rows.slot_TK.tolist(), matters_TK.tolist(), strict=True)
    for position, (experts, slots, matters) in enumerate(triples):
        for expert, slot, does in zip(experts, slots, matters, strict=True):
            if does:
                members.setdefault(Unit(expert, slot), []).append(position)
    return members


def _explain(
    members: Mapping[Unit, Sequence[int]], is_wrong_T: Tensor, rel_T: Tensor, rows: LayerRows
) -> list[Culprit]:
    """As few units as explain the wrong rows, found greedily."""
    wrong = is_wrong_T.tolist()
    cleared = {unit for unit, places in members.items() if not all(wrong[p] for p in places)}
    chosen, num_left = _greedy({u: p for u, p in members.items() if u not in cleared}, wrong)
    if num_left > MAX_LEFT * sum(wrong):
        # Lossy settings hide a fault in some rows, which then clear nobody.
        chosen, _ = _greedy(members, wrong)
    by_expert: dict[int, Culprit] = {}
    for units in chosen:
        key = min(unit.expert for unit in units)
        found = _culprit(units, members, wrong, rel_T, rows)
        by_expert[key] = _merged(by_expert[key], found) if key in by_expert else found
    return sorted(by_expert.values(), key=lambda culprit: -culprit.num_rows)


def _greedy(
    members: Mapping[Unit, Sequence[int]], wrong: Sequence[bool]
) -> tuple[list[tuple[Unit, ...]], int]:
    """Units that explain wrong rows, the likeliest first, and how many rows are left.

    Rows of those found say nothing of the others, and are left out from then on.
    """
    left = {unit: set(places) for unit, places in members.items()}
    unexplained = {position for position, is_wrong in enumerate(wrong) if is_wrong}
    chosen: list[tuple[Unit, ...]] = []
    while unexplained:
        num_wrong = {unit: len(places & unexplained) for unit, places in left.items()}
        # One more right row than there is, so that few rows are weak evidence.
        share = {unit: num_wrong[unit] / (len(left[unit]) + 1) for unit in left}
        most = max(share.values(), default=0.0)
        if most < LIKELY and (chosen or most == 0.0):
            break
        best = sorted(unit for unit, value in share.items() if value == most)
        found = left[best[0]] & unexplained
        # Others with the very same rows are as likely.
        same = tuple(unit for unit in best if left[unit] & unexplained == found)
        chosen.append(same)
        unexplained -= found
        gone = set(left[best[0]])
        left = {unit: places - gone for unit, places in left.items() if unit not in same}
    return chosen, len(unexplained)


def _culprit(
    units: tuple[Unit, ...],
    members: Mapping[Unit, Sequence[int]],
    wrong: Sequence[bool],
    rel_T: Tensor,
    rows: LayerRows,
) -> Culprit:
    places = [position for position in members[units[0]] if wrong[position]]
    expert, slot = units[0]
    computed = int(((rows.index_TK == expert) & (rows.slot_TK == slot)).any(1).sum())
    return Culprit(
        units,
        num_rows=len(places),
        num_computed=computed,
        relative=float(rel_T[places].max()),
        examples=tuple(rows.place_T[position] for position in places[:5]),
    )


def _merged(one: Culprit, other: Culprit) -> Culprit:
    """The same expert, in more slots."""
    return Culprit(
        (*one.units, *other.units),
        one.num_rows + other.num_rows,
        one.num_computed + other.num_computed,
        max(one.relative, other.relative),
        (*one.examples, *other.examples)[:5],
    )
