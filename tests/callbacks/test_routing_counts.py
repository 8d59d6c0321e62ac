"""Counts of one rank and of several: intervals, bounds, and slots by name."""

import torch

from moe_lightning.callbacks import routing_counts
from moe_lightning.callbacks.routing_counts import RoutingCounts
from moe_lightning.dispatch import LayerTrace

CPU = torch.device("cpu")
NUM_EXPERTS = {1: 3, 4: 2}


def trace(layer, index, *, slots=("cpu",), slot=None):
    index_TK = torch.tensor(index).reshape(-1, 1)
    made = LayerTrace(layer, NUM_EXPERTS[layer], index_TK, index_TK.float(), slots=slots)
    if slot is not None:
        made.goes_to(torch.tensor(slot).reshape(-1, 1))
    return made


def alone(tensor, _operation):
    return tensor


def as_lists(by_layer):
    return {layer: tensor.tolist() for layer, tensor in by_layer.items()}


def test_layers_are_counted_apart():
    counts = RoutingCounts(NUM_EXPERTS, device=CPU)
    counts.add(trace(1, [0, 2, 2]))
    counts.add(trace(4, [1]))
    counts.add(trace(1, []))
    counts.add(trace(1, [2]))
    assert as_lists(counts.finish(alone)) == {1: [[1, 0, 3]], 4: [[0, 1]]}
    assert counts.slot_rows() == {}


def test_intervals():
    counts = RoutingCounts(NUM_EXPERTS, device=CPU)
    counts.add(trace(1, [0]))
    counts.end_interval()
    counts.add(trace(1, [1, 1]))
    counts.end_interval()
    assert as_lists(counts.last_interval(alone)) == {1: [0, 2, 0], 4: [0, 0]}
    counts.add(trace(4, [1]))
    assert as_lists(counts.finish(alone)) == {
        1: [[1, 0, 0], [0, 2, 0], [0, 0, 0]],
        4: [[0, 0], [0, 0], [0, 1]],
    }


def test_nothing_at_all():
    counts = RoutingCounts(NUM_EXPERTS, device=CPU)
    assert as_lists(counts.finish(alone)) == {1: [[0, 0, 0]], 4: [[0, 0]]}


def test_many_intervals_are_put_together(monkeypatch):
    monkeypatch.setattr(routing_counts, "MAX_INTERVALS", 4)
    counts = RoutingCounts(NUM_EXPERTS, device=CPU)
    for number in range(11):
        counts.add(trace(1, [0] * (number + 1)))
        counts.end_interval()
    rows_IE = counts.finish(alone)[1]
    assert rows_IE.sum() == 66, "none is lost"
    assert len(rows_IE) <= 5
    # The first five became three (1+2, 3+4, 5 ...), and later ones are of two batches each.
    assert rows_IE[0, 0] in (1 + 2, 1 + 2 + 3 + 4)


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(routing_counts, "MAX_PENDING", 5)
    counts = RoutingCounts(NUM_EXPERTS, device=CPU)
    for _ in range(4):
        counts.add(trace(1, [0, 1, 2]))
    assert counts._num_pending < 5
    assert as_lists(counts.finish(alone))[1] == [[4, 4, 4]]


def test_rows_of_slots():
    counts = RoutingCounts(NUM_EXPERTS, device=CPU)
    counts.add(trace(1, [0, 1, 1], slots=("a", "b"), slot=[0, 1, 0]))
    counts.add(trace(4, [1], slots=("a", "b"), slot=[1]))
    counts.finish(alone)
    assert counts.slots == ("a", "b")
    assert as_lists(counts.slot_rows()) == {1: [2, 1], 4: [0, 1]}


def test_pairs():
    counts = RoutingCounts(NUM_EXPERTS, device=CPU, with_pairs=True)
    index_TK = torch.tensor([[0, 2], [1, 2]])
    counts.add(LayerTrace(1, 3, index_TK, index_TK.float(), slots=("cpu",)))
    counts.finish(alone)
    assert counts.pairs()[1].tolist() == [[1, 0, 1], [0, 1, 1], [1, 1, 2]]
    assert counts.pairs()[4].sum() == 0
