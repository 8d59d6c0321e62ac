"""The placed dispatcher: sums by hand, everything in flight before any wait, and its books."""

import threading
from dataclasses import dataclass, field

import pytest
import torch

from moe_lightning.dispatch import Interleaver, PlacedDispatcher, RoutingLog, make_slots
from moe_lightning.dispatch.plan import LayerRoutes
from moe_lightning.experts import ExpertShard
from moe_lightning.experts.backends import reference
from moe_lightning.modeling.loading import load_experts
from moe_lightning.modeling.seam import find_moe_layers

CPU = torch.device("cpu")
LONG_ENOUGH_S = 20
PICKS_ROWS = {"rows picked": 0, "all rows to every slot": 10**9}


@dataclass
class TimesShard:
    """A shard whose expert e multiplies a row by ``factors[e]``."""

    factors: list[float]
    expert_ids: tuple[int, ...]
    before: object = None
    calls: list = field(default_factory=list)

    def compute(self, rows_RD, index_RK, weights_RK):
        if self.before is not None:
            self.before()
        self.calls.append(rows_RD.shape[0])
        factors = torch.tensor([*(self.factors[e] for e in self.expert_ids), 0.0])
        return rows_RD * (factors[index_RK] * weights_RK).sum(1, keepdim=True)


@pytest.fixture
def place():
    """A dispatcher over CPU slots; ``select_tokens`` as for LayerRoutes."""
    made = []

    def place(shards, *, num_experts, num_slots=None, select_tokens=None, **options):
        slots = make_slots([CPU] * (num_slots or max(shards) + 1), num_threads=1)
        made.extend(slots)
        options = {"log": RoutingLog()} | options
        dispatcher = PlacedDispatcher(shards, slots, num_experts=num_experts, layer=5, **options)
        if select_tokens is not None:
            dispatcher._routes = LayerRoutes(
                num_experts,
                {slot: shard.expert_ids for slot, shard in shards.items()},
                device=CPU,
                select_tokens=select_tokens,
            )
        return dispatcher

    yield place
    for slot in made:
        slot.close()


def times_shards(expert_ids, factors=(1.0, 10.0, 100.0, 1000.0), **befores):
    return {
        slot: TimesShard(list(factors), ids, befores.get(f"slot_{slot}"))
        for slot, ids in expert_ids.items()
    }


HIDDEN_TD = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
INDEX_TK = torch.tensor([[0, 3], [1, 2], [3, 1]])
WEIGHTS_TK = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
# 1 * 1 + 2 * 1000, 3 * 10 + 4 * 100, 5 * 1000 + 6 * 10
FACTORS_T1 = torch.tensor([[2001.0], [430.0], [5060.0]])

PLACES = {
    "one slot": {0: (0, 1, 2, 3)},
    "one slot, another order": {0: (2, 0, 3, 1)},
    "two slots": {0: (0, 1), 1: (2, 3)},
    "one slot, not home": {2: (0, 1, 2, 3)},
    "home is empty": {1: (0, 3), 2: (1, 2)},
    "a slot between is empty": {0: (0,), 2: (1, 2), 3: (3,)},
    "not contiguous, not in order": {0: (3, 0), 1: (2, 1)},
    "replicas": {0: (0, 1, 3), 1: (1, 2, 3), 2: (1, 3)},
    "every expert everywhere": {0: (0, 1, 2, 3), 1: (3, 2, 1, 0)},
}


@pytest.mark.parametrize("select_tokens", PICKS_ROWS.values(), ids=PICKS_ROWS.keys())
@pytest.mark.parametrize("experts", PLACES.values(), ids=PLACES.keys())
def test_the_sum_over_all_slots_by_hand(place, experts, select_tokens):
    dispatcher = place(times_shards(experts), num_experts=4, select_tokens=select_tokens)
    for _ in range(2):  # the first pass must leave nothing behind
        out_TD = dispatcher(HIDDEN_TD, INDEX_TK, WEIGHTS_TK)
        assert torch.equal(out_TD, HIDDEN_TD * FACTORS_T1)
    assert HIDDEN_TD.tolist() == [[1, 2], [3, 4], [5, 6]], "the rows are somebody else's"


@pytest.mark.parametrize("select_tokens", PICKS_ROWS.values(), ids=PICKS_ROWS.keys())
@pytest.mark.parametrize("experts", PLACES.values(), ids=PLACES.keys())
def test_no_rows(place, experts, select_tokens):
    dispatcher = place(times_shards(experts), num_experts=4, select_tokens=select_tokens)
    out_TD = dispatcher(HIDDEN_TD[:0], INDEX_TK[:0], WEIGHTS_TK[:0])
    assert out_TD.shape == (0, 2)
    assert out_TD.dtype == HIDDEN_TD.dtype


def test_only_slots_with_rows_are_asked(place):
    shards = times_shards({0: (0,), 1: (1,), 2: (2, 3)})
    dispatcher = place(shards, num_experts=4)
    dispatcher(HIDDEN_TD, torch.tensor([[0, 3], [0, 2], [3, 2]]), WEIGHTS_TK)
    assert [shard.calls for shard in shards.values()] == [[2], [], [3]]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@torch.inference_mode()
def test_real_experts_give_what_the_family_gives(
    family, place, family_checkpoint, plain_transformers, loaded_module
):
    """Biases, and layouts of weights, of shards that were loaded apart."""
    path = family_checkpoint(family)
    family_experts = find_moe_layers(plain_transformers(path).model)[1].experts
    view = loaded_module(path).view
    shards = {}
    for slot, ids in {0: (5, 0), 1: (1, 2, 3), 3: (4, 7, 6)}.items():
        loaded = load_experts(
            view, device=CPU, dtype=torch.float32, experts={1: ids}, show_progress=False
        )
        shards[slot] = ExpertShard(loaded[1], layer=1, expert_ids=ids, backend="grouped_mm")
    generator = torch.Generator().manual_seed(7)
    hidden_TD = torch.randn(23, 32, generator=generator)
    weights_TK, index_TK = torch.rand(23, 8, generator=generator).topk(3, dim=1)
    out_TD = place(shards, num_experts=8)(hidden_TD, index_TK, weights_TK)
    want_TD = reference(family_experts, hidden_TD, index_TK, weights_TK)
    # fp32 sums in another order.
    torch.testing.assert_close(out_TD, want_TD, atol=1e-5, rtol=1e-5)


# The order of things.


def test_the_sum_is_in_the_order_of_the_slots_whoever_is_first(place):
    # In fp32, (1e8 - 1e8) + 1 is 1, and 1e8 + (-1e8 + 1) is 0: the order can be seen.
    is_done = {slot: threading.Event() for slot in (1, 2)}
    shards = times_shards({0: (0,), 1: (1,), 2: (2,)}, factors=(1e8, -1e8, 1.0))
    dispatcher = place(shards, num_experts=3)
    one_T1, index_TK, weights_TK = torch.ones(1, 1), torch.tensor([[2, 1, 0]]), torch.ones(1, 3)
    for first, second in ((1, 2), (2, 1)):
        for event in is_done.values():
            event.clear()
        shards[first].before = is_done[first].set
        shards[second].before = lambda first=first: is_done[first].wait(LONG_ENOUGH_S)
        assert dispatcher(one_T1, index_TK, weights_TK).tolist() == [[1.0]]


@torch.inference_mode()
def test_repeats_are_bitwise_equal(place):
    generator = torch.Generator().manual_seed(3)
    factors = torch.randn(8, generator=generator).tolist()
    places = {0: (0, 5, 6), 1: (1, 5, 7), 2: (2, 5), 3: (3, 4, 6)}
    dispatcher = place(times_shards(places, factors=factors), num_experts=8)
    hidden_TD = torch.randn(64, 16, generator=generator)
    weights_TK, index_TK = torch.rand(64, 8, generator=generator).topk(5, dim=1)
    first = dispatcher(hidden_TD, index_TK, weights_TK)
    for _ in range(20):
        assert torch.equal(dispatcher(hidden_TD, index_TK, weights_TK), first)


def test_home_computes_while_the_others_do(place):
    barrier = threading.Barrier(3)

    def meet():
        barrier.wait(LONG_ENOUGH_S)  # nobody passes before all three are at work

    shards = times_shards({0: (0,), 1: (1,), 2: (2, 3)}, slot_0=meet, slot_1=meet, slot_2=meet)
    out_TD = place(shards, num_experts=4)(HIDDEN_TD, INDEX_TK, WEIGHTS_TK)
    assert torch.equal(out_TD, HIDDEN_TD * FACTORS_T1)


def test_other_work_is_done_once_while_the_rows_are_away(place):
    barrier, calls = threading.Barrier(2), []

    def meanwhile():
        barrier.wait(LONG_ENOUGH_S)
        calls.append(threading.current_thread())

    shards = times_shards({0: (0, 1, 2), 1: (3,)}, slot_1=lambda: barrier.wait(LONG_ENOUGH_S))
    dispatcher = place(shards, num_experts=4)
    dispatcher(HIDDEN_TD, INDEX_TK, WEIGHTS_TK, meanwhile)
    assert calls == [threading.current_thread()]
    assert shards[0].calls == [3], "home's share comes after it, in the same thread"


@pytest.mark.parametrize("experts", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_other_work_is_never_done_twice(place, experts, num_tokens):
    calls = []
    dispatcher = place(times_shards(experts), num_experts=4)
    rows = (HIDDEN_TD[:num_tokens], INDEX_TK[:num_tokens], WEIGHTS_TK[:num_tokens])
    out_TD = dispatcher(*rows, lambda: calls.append(1))
    assert len(calls) <= 1
    assert torch.equal(out_TD, (HIDDEN_TD * FACTORS_T1)[:num_tokens])


def test_while_the_rows_of_one_half_of_a_batch_are_away_the_other_goes_on(place):
    barrier = threading.Barrier(2)

    def meet():
        barrier.wait(LONG_ENOUGH_S)  # only if both halves have rows in flight

    shards = times_shards({0: (0, 1), 1: (2,), 2: (3,)}, slot_1=meet, slot_2=meet)
    interleaver = Interleaver(min_tokens=1)
    dispatcher = place(shards, num_experts=4, interleaver=interleaver)
    one_T1, weights_TK = torch.ones(1, 1), torch.ones(1, 2)
    first, second = interleaver.run(
        [
            lambda: dispatcher(one_T1, torch.tensor([[0, 2]]), weights_TK),
            lambda: dispatcher(one_T1, torch.tensor([[3, 1]]), weights_TK),
        ]
    )
    assert (first.item(), second.item()) == (101, 1010)


def test_a_failure_on_one_slot_is_told_and_the_next_pass_is_right(place):
    failures = [ValueError("slot 1 is broken")]

    def fail_once():
        if failures:
            raise failures.pop()

    shards = times_shards({0: (0, 1), 1: (2,), 2: (3,)}, slot_1=fail_once)
    dispatcher = place(shards, num_experts=4)
    with pytest.raises(ValueError, match="slot 1 is broken"):
        dispatcher(HIDDEN_TD, INDEX_TK, WEIGHTS_TK)
    out_TD = dispatcher(HIDDEN_TD, INDEX_TK, WEIGHTS_TK)
    assert torch.equal(out_TD, HIDDEN_TD * FACTORS_T1)


# Its books.


def traced(dispatcher, log, *rows):
    traces = []
    log.subscribe(traces.append)
    out_TD = dispatcher(*rows)
    (trace,) = traces
    return out_TD, trace


def parts(trace):
    return {(span.part, span.slot): span.num_bytes for span in trace.spans}


def test_a_trace_has_each_part_of_each_slot_with_the_bytes_that_moved(place):
    log = RoutingLog()
    shards = times_shards({0: (0,), 1: (1,), 2: (2, 3)})
    dispatcher = place(shards, num_experts=4, log=log)
    unread_TD = dispatcher(HIDDEN_TD, INDEX_TK, WEIGHTS_TK)
    out_TD, trace = traced(dispatcher, log, HIDDEN_TD, INDEX_TK, WEIGHTS_TK)
    assert torch.equal(out_TD, unread_TD), "looking must not change the answer"
    assert (trace.layer, trace.num_experts) == (5, 4)
    assert torch.equal(trace.index_TK, INDEX_TK)
    assert torch.equal(trace.weights_TK, WEIGHTS_TK)
    # A row has D = 2 floats, K = 2 experts in int64 and K = 2 weights: 8 + 16 + 8 bytes; its result
    # has 8. Home has 1 row, slot 1 has 2, slot 2 has 3; rows at home do not move.
    assert parts(trace) == {
        ("dispatch", "0:cpu"): 0,
        ("compute", "0:cpu"): 0,
        ("combine", "0:cpu"): 0,
        ("dispatch", "1:cpu"): 2 * 32,
        ("compute", "1:cpu"): 0,
        ("wait", "1:cpu"): 0,
        ("combine", "1:cpu"): 2 * 8,
        ("dispatch", "2:cpu"): 3 * 32,
        ("compute", "2:cpu"): 0,
        ("wait", "2:cpu"): 0,
        ("combine", "2:cpu"): 3 * 8,
    }
    assert len(trace.spans) == 11, "each of them once"


def test_the_spans_of_a_slot_follow_each_other(place):
    log = RoutingLog()
    dispatcher = place(times_shards({0: (0,), 1: (1, 2), 2: (3,)}), num_experts=4, log=log)
    _, trace = traced(dispatcher, log, HIDDEN_TD, INDEX_TK, WEIGHTS_TK)
    spans = {(span.part, span.slot): span for span in trace.spans}
    for span in trace.spans:
        assert span.start_s <= span.end_s
    for slot in ("0:cpu", "1:cpu", "2:cpu"):
        combine, compute = spans["combine", slot], spans["compute", slot]
        assert spans["dispatch", slot].start_s <= compute.start_s
        assert compute.end_s <= combine.start_s
    # All are in flight before home's share begins.
    for slot in ("1:cpu", "2:cpu"):
        assert spans["dispatch", slot].end_s <= spans["compute", "0:cpu"].start_s
        assert spans["wait", slot].end_s <= spans["combine", slot].start_s


def test_a_trace_of_experts_that_are_all_at_home_is_one_span(place):
    log = RoutingLog()
    dispatcher = place(times_shards({0: (0, 1, 2, 3)}), num_experts=4, num_slots=2, log=log)
    _, trace = traced(dispatcher, log, HIDDEN_TD, INDEX_TK, WEIGHTS_TK)
    assert parts(trace) == {("compute", "0:cpu"): 0}


def test_no_rows_leave_a_trace_too(place):
    log = RoutingLog()
    dispatcher = place(times_shards({0: (0, 1), 1: (2, 3)}), num_experts=4, log=log)
    _, trace = traced(dispatcher, log, HIDDEN_TD[:0], INDEX_TK[:0], WEIGHTS_TK[:0])
    assert trace.index_TK.shape == (0, 2)
    assert sum(span.num_bytes for span in trace.spans) == 0
