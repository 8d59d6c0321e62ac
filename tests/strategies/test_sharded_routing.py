"""Routing counted in fits over ranks is that of one process: each row once, whatever the layout."""

from unittest import mock

import torch
import torch.distributed as dist
from fit_runs import Fit, fit
from ranks import run_on_ranks

from moe_lightning import RoutingBalance
from moe_lightning.callbacks import routing_counts
from moe_lightning.callbacks.routing_counts import RoutingCounts
from moe_lightning.dispatch import LayerTrace

LAYOUTS = {
    "fsdp": {"fsdp_size": 2},
    "ep": {"ep_size": 2},
    "tp": {"tp_size": 2},
}


def loads_of(path, layouts):
    """Rows of each expert by layer, of each layout; the weights stay as they are."""
    loads = {}
    for name, strategy in layouts.items():
        callback = RoutingBalance(picture=False)
        options = {"callbacks": [callback], "default_root_dir": path.parent / name}
        fit(path, Fit(strategy=strategy, trainer=options, num_steps=3, lr=0.0))
        slots = callback.summary.slot_rows
        loads[name] = (
            {each.layer: each.load_E.tolist() for each in callback.summary.layers},
            {layer: int(rows_S.sum()) for layer, rows_S in slots.items()},
        )
    return loads


def test_fits_over_two_ranks(family_checkpoint) -> None:
    path = family_checkpoint("qwen3_moe")
    want, _ = loads_of(path, {"one": None})["one"]
    assert sum(map(sum, want.values())) == 3 * 8 * 12 * 2 * 3, "steps, rows, tokens, K, layers"
    for rank in run_on_ranks(2, loads_of, path, LAYOUTS):
        for name, (loads, slots) in rank.items():
            assert loads == want, name
            if name == "ep":
                assert slots == {layer: sum(rows) for layer, rows in want.items()}


def test_ranks_with_different_numbers_of_batches():
    """Rank 0 has so many intervals that it puts them together; ranks 2 and 3 share other slots."""
    results = run_on_ranks(4, _count_over_ranks)
    assert all(result == results[0] for result in results)
    rows, slots, slot_rows = results[0]
    assert sum(interval[0] for interval in rows[1]) == 11 + 2
    assert sum(interval[2] for interval in rows[1]) == 2
    assert slots == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert slot_rows == [11, 1, 2, 1]


def _count_over_ranks():
    with mock.patch.object(routing_counts, "MAX_INTERVALS", 4):
        return _counted()


def _counted():
    rank = dist.get_rank()
    group = ("rank 0", "rank 1") if rank < 2 else ("rank 2", "rank 3")
    counts = RoutingCounts({1: 3, 4: 2}, device=torch.device("cpu"), num_ranks=4)

    def reduce(tensor, operation):
        whole = tensor.clone()
        dist.all_reduce(whole, dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM)
        return whole

    def pass_of(experts, slots, slot):
        index_TK = torch.tensor(experts)[:, None]
        trace = LayerTrace(1, 3, index_TK, index_TK.float(), slots=slots)
        trace.goes_to(torch.tensor(slot)[:, None])
        return trace

    for _ in range(11 if rank == 0 else 0):
        counts.add(pass_of([0], group, [0]))
        counts.end_interval()
    if rank == 1:
        counts.add(pass_of([2], group, [1]))
    if rank == 2:
        counts.add(pass_of([0, 0, 2], group, [0, 0, 1]))
    rows = {layer: of_layer.tolist() for layer, of_layer in counts.finish(reduce).items()}
    return rows, list(counts.slots), counts.slot_rows()[1].tolist()
