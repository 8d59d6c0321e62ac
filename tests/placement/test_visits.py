"""How many slots a row goes to: against rows that are drawn."""

import numpy as np
import pytest

from moe_lightning.dispatch.plan import SELECT_TOKENS
from moe_lightning.errors import UsageError
from moe_lightning.placement.footprint import LayerSizes, ModelSizes
from moe_lightning.placement.policies import linear
from moe_lightning.placement.recording import Recording
from moe_lightning.placement.visits import GPU_SELECTS_FROM, visits


def model(num_experts, top_k):
    layers = tuple(LayerSizes(10, 10 * number, number) for number in num_experts)
    return ModelSizes("Tiny", "float32", 8, layers, 30, 30, 5, top_k, (4, 2))


def drawn(sizes, num_slots, weights=None, num_rows=20_000, groups=1):
    """Rows' slots, counted, and what a recording says of the rows.

    Args:
        groups: Experts of a row come from one of so many groups; 1 is no such thing.
    """
    random = np.random.default_rng(0)
    placement = linear(sizes.experts_by_layer, num_slots)
    shares, loads, together = np.zeros(num_slots), {}, {}
    for layer, number in sizes.experts_by_layer.items():
        weight_TE = (
            np.ones((num_rows, number)) if weights is None else np.tile(weights, (num_rows, 1))
        )
        if groups > 1:
            is_in = np.arange(number) % groups == random.integers(groups, size=num_rows)[:, None]
            weight_TE = weight_TE * np.where(is_in, 10.0, 1.0)
        # The largest of perturbed logarithms are drawn one after another without putting back.
        noise_TE = random.gumbel(size=weight_TE.shape)
        chosen_TK = np.argsort(-(np.log(weight_TE) + noise_TE), axis=1)[:, : sizes.top_k]
        chosen_TE = np.zeros((num_rows, number), dtype=np.int64)
        np.put_along_axis(chosen_TE, chosen_TK, 1, axis=1)
        loads[layer] = chosen_TE.sum(axis=0, keepdims=True)
        together[layer] = chosen_TE.T @ chosen_TE
        for slot in range(num_slots):
            here = list(placement.experts_of(slot, layer))
            shares[slot] += chosen_TE[:, here].any(axis=1).mean() / len(sizes.experts_by_layer)
    return shares, Recording(loads, together)


def test_two_experts_on_two_slots_by_hand() -> None:
    # Of 6 pairs of 4 experts one has both on the other slot.
    assert visits(model([4], 2), 2) == pytest.approx([5 / 6, 5 / 6])
    assert visits(model([4], 1), 2) == pytest.approx([1 / 2, 1 / 2])
    assert visits(model([4], 4), 2) == [1.0, 1.0]
    assert visits(model([4], 2), 1) == [1.0]
    assert visits(model([2], 1), 4)[2:] == [0.0, 0.0]
    assert visits(model([2], 2), 2) == [1.0, 1.0]


@pytest.mark.parametrize(("num_slots", "saving"), [(2, 4.0), (4, 2.2), (8, 1.5), (16, 1.24)])
def test_what_sending_a_row_once_per_slot_saves(num_slots, saving) -> None:
    # Against a copy for each of 8 experts; the published figures have two digits.
    assert 8 / sum(visits(model([256], 8), num_slots)) == pytest.approx(saving, rel=0.03)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_slots"),
    [((16,), 2, 3), ((7, 5), 2, 2), ((64,), 8, 4), ((32, 32), 4, 5), ((8,), 6, 8)],
)
def test_uniform_routing_is_exact(num_experts, top_k, num_slots) -> None:
    sizes = model(num_experts, top_k)
    shares, _ = drawn(sizes, num_slots)
    assert visits(sizes, num_slots) == pytest.approx(shares, rel=0.02)


@pytest.mark.parametrize(
    ("top_k", "num_slots", "groups"), [(2, 3, 4), (8, 4, 1), (8, 2, 4), (4, 8, 8)]
)
def test_recorded_routing(top_k, num_slots, groups) -> None:
    sizes = model([32], top_k)
    uneven = np.random.default_rng(1).lognormal(0, 1, size=32)
    shares, recording = drawn(sizes, num_slots, uneven, groups=groups)
    assert sum(visits(sizes, num_slots, recording)) == pytest.approx(shares.sum(), rel=0.02)
    if top_k == 2:  # pairs say all
        assert visits(sizes, num_slots, recording) == pytest.approx(shares)


def test_loads_without_pairs_are_taken_to_be_independent() -> None:
    sizes = model([32], 2)
    uneven = np.random.default_rng(1).lognormal(0, 1, size=32)
    shares, recording = drawn(sizes, 4, uneven)
    alone = Recording(recording.loads)
    assert visits(sizes, 4, alone) == pytest.approx(shares, rel=0.05)


def test_a_recording_of_another_model_is_refused() -> None:
    _, recording = drawn(model([8], 2), 2, num_rows=10)
    with pytest.raises(UsageError, match=r"1 MoE layers with 8 experts, this model 2 with 8"):
        visits(model([8, 8], 2), 2, recording)


def test_gpus_select_rows_from_as_many_tokens_as_the_dispatcher_does() -> None:
    assert GPU_SELECTS_FROM == SELECT_TOKENS
