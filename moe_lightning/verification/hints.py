"""What is wrong with an expert, told from what it adds to a few rows."""

import torch
from torch import Tensor

from moe_lightning.verification.differences import relative_differences
from moe_lightning.verification.layer_rows import Compute, LayerRows, Unit

NUM_PROBES = 4


def hint_of(
    expert: int,
    rows: LayerRows,
    compute: Compute,
    probes: Tensor,
    num_experts: int,
    limit: float,
) -> str:
    """What an expert computes instead of its own.

    Args:
        expert: The expert.
        rows: The layer's rows.
        compute: The reference's experts.
        probes: Positions that tell, see :func:`telling_rows`.
        num_experts: Experts of the layer.
        limit: The largest relative difference of what is taken to be the same.

    Returns:
        It in words; empty if it cannot be told.
    """
    if len(probes) == 0:
        return ""
    index_PK, weights_PK = rows.index_TK[probes], rows.weights_TK[probes].float()
    is_it_PK = index_PK == expert
    hidden_PD, own_P = rows.hidden_TD[probes], (weights_PK * is_it_PK).sum(1)
    others_PD = compute(hidden_PD, index_PK, weights_PK.masked_fill(is_it_PK, 0.0)).float()
    got_PD = rows.out_TD[probes].float() - others_PD
    wanted_PD = compute(hidden_PD, index_PK, weights_PK.masked_fill(~is_it_PK, 0.0)).float()
    if float((got_PD.norm(dim=1) / wanted_PD.norm(dim=1).clamp(min=1e-30)).max()) < limit:
        return "it adds nothing"
    other = _computes_another(expert, hidden_PD, own_P, got_PD, compute, num_experts, limit)
    if other is not None:
        return f"it computes what expert {other} should"
    factor_P = (got_PD * wanted_PD).sum(1) / wanted_PD.square().sum(1).clamp(min=1e-30)
    if float(relative_differences(got_PD, factor_P[:, None] * wanted_PD).max()) < limit:
        return f"it is off by a factor of {float(factor_P.mean()):.3g}"
    offset_PD = (got_PD - wanted_PD) / own_P[:, None]
    spread_P = relative_differences(offset_PD, offset_PD.mean(0)[None])
    if len(probes) > 1 and float(spread_P.max()) < limit:
        return "it is off by the same vector for every row: the bias of its output"
    return ""


def telling_rows(expert: int, rows: LayerRows, blamed: set[Unit], is_wrong_T: Tensor) -> Tensor:
    """Wrong positions of an expert that no other culprit has a part in.

    Args:
        expert: The expert.
        rows: The layer's rows.
        blamed: All culprits.
        is_wrong_T: Positions whose sums are wrong.

    Returns:
        A few of them, those in which the expert has the largest part.
    """
    found = []
    for position in is_wrong_T.nonzero().squeeze(1).tolist():
        experts = rows.index_TK[position].tolist()
        units = {Unit(*u) for u in zip(experts, rows.slot_TK[position].tolist(), strict=True)}
        if expert in experts and all(unit.expert == expert for unit in units & blamed):
            found.append(position)
    # Those in which it has the largest part tell most.
    weights = [(rows.weights_TK[p] * (rows.index_TK[p] == expert)).sum().item() for p in found]
    order = sorted(range(len(found)), key=lambda n: -abs(weights[n]))[:NUM_PROBES]
    return torch.tensor([found[n] for n in order], dtype=torch.int64)


def _computes_another(
    expert: int,
    hidden_PD: Tensor,
    own_P: Tensor,
    got_PD: Tensor,
    compute: Compute,
    num_experts: int,
    limit: float,
) -> int | None:
    """Another expert whose output it is."""
    off = {}
    for other in range(num_experts):
        index_P1 = torch.full((len(own_P), 1), other)
        off[other] = float(
            relative_differences(got_PD, compute(hidden_PD, index_P1, own_P[:, None]).float()).max()
        )
    best = min(off, key=lambda other: off[other])
    return best if best != expert and off[best] < limit else None
