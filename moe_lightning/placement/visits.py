"""Visits: to which slots a token's row goes, when its experts are spread over them. No torch.

A row goes once to each slot that has one of its K experts. Let p be the probability that one of
them is on a slot, and q that two of them are. Experts are drawn as from Pólya's urn (Eggenberger
and Pólya 1923), which has exactly these two:

    P(none is there) = (1-p)/1 * (1-p + c)/(1 + c) * ... * (1-p + (K-1)c)/(1 + (K-1)c)
    c = (q - p^2) / (p - q)

With uniform routing that is drawing without putting back, c = -1/E, and exact. With a recording it
is exact for two experts a token, and for more it goes by what pairs say.
"""

from collections.abc import Mapping

import numpy as np

from moe_lightning.errors import UsageError
from moe_lightning.placement.footprint import ModelSizes
from moe_lightning.placement.policies import linear
from moe_lightning.placement.recording import Recording

GPU_SELECTS_FROM = 256
"""Tokens of a pass from which rows are picked for each GPU of one process; fewer go to all."""


def visits(sizes: ModelSizes, num_slots: int, routing: Recording | None = None) -> list[float]:
    """The share of rows that go to each slot, mean over the MoE layers, with the policy linear.

    Args:
        sizes: The model.
        num_slots: Slots that hold experts.
        routing: What routers did in a run; None is uniform routing.

    Returns:
        For each slot between 0 and 1.

    Raises:
        UsageError: If the recording is of another model.
    """
    num_experts = sizes.experts_by_layer
    if routing is not None:
        _check(num_experts, routing)
    placement = linear(num_experts, num_slots)
    shares = np.zeros(num_slots)
    for layer, number in num_experts.items():
        loads_E, both_EE = _statistics(number, layer, routing)
        for slot in range(num_slots):
            here = list(placement.experts_of(slot, layer))
            one = float(loads_E[here].sum())
            two = float(both_EE[np.ix_(here, here)].sum())
            shares[slot] += _visited(one, two, sizes.top_k)
    return [float(share) / max(1, len(num_experts)) for share in shares]


def _statistics(
    number: int, layer: int, routing: Recording | None
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of each expert to be a row's first, and of each two to be its first two, in a
    random order."""
    loads_E = np.ones(number)
    if routing is not None:
        loads_E = routing.loads[layer].sum(axis=0).astype(np.float64)
    both_EE = np.outer(loads_E, loads_E)
    if routing is not None and layer in routing.together:
        both_EE = routing.together[layer].astype(np.float64)
    np.fill_diagonal(both_EE, 0.0)
    return loads_E / max(1.0, loads_E.sum()), both_EE / max(1.0, both_EE.sum())


def _visited(one: float, two: float, top_k: int) -> float:
    """Whether any of a row's experts is on a slot, from the probabilities of one and of two."""
    if one >= 1.0 or one <= two:  # all rows' experts are there, or always all of them or none
        return one
    more = (two - one * one) / (one - two)
    none = 1.0
    for drawn in range(top_k):
        none *= max(0.0, 1 - one + drawn * more) / (1 + drawn * more)
    return 1.0 - none


def _check(num_experts: Mapping[int, int], routing: Recording) -> None:
    recorded = {layer: loads_IE.shape[1] for layer, loads_IE in routing.loads.items()}
    if recorded != num_experts:
        raise UsageError(
            f"--routing is of another model: it has {len(recorded)} MoE layers with "
            f"{_numbers(recorded)} experts, this model {len(num_experts)} with "
            f"{_numbers(num_experts)}. Give the recording of a run of this checkpoint."
        )


def _numbers(num_experts: Mapping[int, int]) -> str:
    return " or ".join(str(number) for number in sorted({*num_experts.values()}))
