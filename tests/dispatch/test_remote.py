"""The remote dispatcher with workers that are made up: its sums by hand, the order of things, what
becomes of the rows of lost workers, and its books."""

import threading
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.dispatch import Interleaver, RemoteDispatcher, RoutingLog
from moe_lightning.dispatch.plan import LayerRoutes
from moe_lightning.errors import WorkersLostError
from moe_lightning.transport.transport import WorkerLost

CPU = torch.device("cpu")
LONG_ENOUGH_S = 20
LAYER, E = 5, 4
PICKS_ROWS = {"rows picked": 0, "all rows to every slot": 10**9}
SENT_BYTES, RECEIVED_BYTES = 100, 10  # of a row, as the made-up workers count them


def times(rows_RD, index_RK, weights_RK, *, held):
    """Expert e multiplies a row by 10 to the power of e; what it must not compute is refused."""
    asked = set(index_RK.flatten().tolist()) - {E}
    assert asked <= set(held), f"{asked} asked of one that holds {held}"
    factors = torch.tensor([1.0, 10.0, 100.0, 1000.0, 0.0], dtype=rows_RD.dtype)
    return rows_RD * (factors[index_RK] * weights_RK).sum(1, keepdim=True).to(rows_RD.dtype)


@dataclass
class MadeUpFlight:
    remote: "MadeUpWorkers"
    slot: int
    rows: tuple
    num_bytes_sent: int = 0
    num_bytes_received: int = 0
    compute_s: float = 0.25

    def result(self):
        self.remote.happened("wait", self.slot)
        if self.slot in self.remote.dies_before_it_answers:
            raise self.remote.loss(self.slot)
        if self.remote.on_wait is not None:
            self.remote.on_wait(self.slot)
        self.num_bytes_received = RECEIVED_BYTES * len(self.rows[0])
        return times(*self.rows, held=self.remote.experts[self.slot])


@dataclass
class MadeUpWorkers:
    """Slots 0 to 3 are workers, slot 4 is home.

    Attributes:
        experts: The experts of each slot that holds any.
        adopters: Who takes over the experts of a lost worker.
        dies_before_it_is_asked: Workers that are known to be gone when they are asked.
        dies_before_it_answers: Workers that are lost while their answer is waited for.
    """

    experts: dict
    adopters: dict = field(default_factory=dict)
    dies_before_it_is_asked: set = field(default_factory=set)
    dies_before_it_answers: set = field(default_factory=set)
    select_tokens: int | None = None
    on_wait: object = None
    events: list = field(default_factory=list)
    home = 4
    names = ("w0", "w1", "w2", "w3", "master")

    def happened(self, *event):
        self.events.append(event)

    def loss(self, slot):
        return WorkerLost(slot, "made up")

    def routes(self, layer):
        assert layer == LAYER
        return LayerRoutes(
            E, self.experts, device=CPU, select_tokens=self.select_tokens, numbering="logical"
        )

    def held_at_home(self, layer):
        assert layer == LAYER
        return self

    def compute(self, *rows):
        self.happened("home")
        return times(*rows, held=self.experts[self.home])

    def ask(self, slot, layer, *rows):
        assert layer == LAYER
        self.happened("send", slot, len(rows[0]))
        if slot in self.dies_before_it_is_asked:
            raise self.loss(slot)
        assert slot in self.experts, f"slot {slot} is lost, or holds nothing"
        rows = tuple(each.clone() for each in rows)  # as they are now
        return MadeUpFlight(self, slot, rows, SENT_BYTES * len(rows[0]))

    def recover(self, slot):
        self.happened("recover", slot)
        orphans = self.experts.pop(slot, ())
        for expert in orphans:
            if any(expert in held for held in self.experts.values()):
                continue  # a replica
            adopter = self.adopters.get(slot)
            if adopter is None:
                raise WorkersLostError(f"nobody adopts expert {expert}")
            self.experts[adopter] = (*self.experts.get(adopter, ()), expert)


def dispatcher_to(remote, **options):
    return RemoteDispatcher(remote, num_experts=E, layer=LAYER, **{"log": RoutingLog()} | options)


HIDDEN_TD = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
INDEX_TK = torch.tensor([[0, 3], [1, 2], [3, 1]])
WEIGHTS_TK = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
# 1 * 1 + 2 * 1000, 3 * 10 + 4 * 100, 5 * 1000 + 6 * 10
OUT_TD = HIDDEN_TD * torch.tensor([[2001.0], [430.0], [5060.0]])

PLACES = {
    "one worker": {0: (0, 1, 2, 3)},
    "two workers": {0: (0, 1), 1: (2, 3)},
    "a worker between is empty": {0: (0,), 2: (1, 2), 3: (3,)},
    "the first one is empty": {1: (0, 3), 2: (1, 2)},
    "home holds some": {0: (0, 2), 4: (1, 3)},
    "home holds all": {4: (0, 1, 2, 3)},
    "not in order": {0: (3, 0), 1: (2, 1)},
    "replicas": {0: (0, 1, 3), 1: (1, 2, 3), 4: (1, 3)},
    "every expert everywhere": {0: (0, 1, 2, 3), 1: (3, 2, 1, 0)},
}


@pytest.mark.parametrize("select_tokens", PICKS_ROWS.values(), ids=PICKS_ROWS.keys())
@pytest.mark.parametrize("experts", PLACES.values(), ids=PLACES.keys())
def test_the_sum_over_all_workers_by_hand(experts, select_tokens):
    dispatcher = dispatcher_to(MadeUpWorkers(experts, select_tokens=select_tokens))
    for _ in range(2):  # the first pass must leave nothing behind
        assert torch.equal(dispatcher(HIDDEN_TD, INDEX_TK, WEIGHTS_TK), OUT_TD)
    assert HIDDEN_TD.tolist() == [[1, 2], [3, 4], [5, 6]], "the rows are somebody else's"


@pytest.mark.parametrize("select_tokens", PICKS_ROWS.values(), ids=PICKS_ROWS.keys())
@pytest.mark.parametrize("experts", PLACES.values(), ids=PLACES.keys())
def test_no_rows(experts, select_tokens):
    dispatcher = dispatcher_to(MadeUpWorkers(experts, select_tokens=select_tokens))
    out_TD = dispatcher(HIDDEN_TD[:0].bfloat16(), INDEX_TK[:0], WEIGHTS_TK[:0])
    assert out_TD.shape == (0, 2)
    assert out_TD.dtype == torch.bfloat16


def test_a_row_travels_to_a_worker_once_and_to_others_not_at_all():
    remote = MadeUpWorkers({0: (0,), 1: (1,), 2: (2, 3)})
    dispatcher_to(remote)(HIDDEN_TD, torch.tensor([[0, 3], [0, 2], [3, 2]]), WEIGHTS_TK)
    assert [event for event in remote.events if event[0] == "send"] == [
        ("send", 0, 2),
        ("send", 2, 3),
    ]


# The order of things.


def test_all_rows_leave_before_any_answer_is_waited_for():
    remote = MadeUpWorkers({0: (0,), 2: (1, 2), 3: (3,), 4: ()})
    remote.experts[4] = (1,)
    dispatcher = dispatcher_to(remote)
    dispatcher(HIDDEN_TD, INDEX_TK, WEIGHTS_TK, lambda: remote.happened("meanwhile"))
    assert [event[:2] for event in remote.events] == [
        ("send", 0),
        ("send", 2),
        ("send", 3),
        ("meanwhile",),
        ("home",),
        ("wait", 0),
        ("wait", 2),
        ("wait", 3),
    ]


@pytest.mark.parametrize("experts", PLACES.values(), ids=PLACES.keys())
def test_other_work_is_done_once_and_only_while_rows_are_away(experts):
    calls = []
    dispatcher_to(MadeUpWorkers(experts))(HIDDEN_TD, INDEX_TK, WEIGHTS_TK, lambda: calls.append(1))
    assert calls == [1] * any(slot < 4 for slot in experts)


def test_the_sum_is_in_the_order_of_home_and_then_the_workers():
    # In fp32, (1e8 - 1e8) + 1 is 1, and 1e8 + (-1e8 + 1) is 0: the order can be seen.
    remote = MadeUpWorkers({4: (0,), 1: (1,), 3: (2,), 0: (3,)})
    weights_TK = torch.tensor([[1e8, -1e7, 0.01, 0.0]])
    index_TK = torch.tensor([[0, 1, 2, 3]])
    assert dispatcher_to(remote)(torch.ones(1, 1), index_TK, weights_TK).tolist() == [[1.0]]


def test_while_the_rows_of_one_part_are_away_another_part_goes_on():
    barrier = threading.Barrier(2)
    remote = MadeUpWorkers({0: (0, 1), 1: (2,), 2: (3,)})
    # Only if both parts wait at the same time.
    remote.on_wait = lambda slot: slot > 0 and barrier.wait(LONG_ENOUGH_S)
    dispatcher = dispatcher_to(remote, interleaver=(turns := Interleaver(min_tokens=1)))
    one_T1, weights_TK = torch.ones(1, 1), torch.ones(1, 2)
    first, second = turns.run(
        [
            lambda: dispatcher(one_T1, torch.tensor([[0, 2]]), weights_TK),
            lambda: dispatcher(one_T1, torch.tensor([[3, 1]]), weights_TK),
        ]
    )
    assert (first.item(), second.item()) == (101, 1010)


# Losses. Sums of small integers are the same in any order, so they must be right to the bit.

LOSSES = {"when asked": "dies_before_it_is_asked", "when waited for": "dies_before_it_answers"}


@pytest.mark.parametrize("select_tokens", PICKS_ROWS.values(), ids=PICKS_ROWS.keys())
@pytest.mark.parametrize("adopter", [0, 2, 3, 4])
@pytest.mark.parametrize("when", LOSSES.values(), ids=LOSSES.keys())
def test_the_rows_of_a_lost_worker_go_to_who_adopts_its_experts(when, adopter, select_tokens):
    remote = MadeUpWorkers(
        {0: (0,), 1: (1, 3), 2: (2,)}, adopters={1: adopter}, select_tokens=select_tokens
    )
    getattr(remote, when).add(1)
    dispatcher = dispatcher_to(remote)
    assert torch.equal(dispatcher(HIDDEN_TD, INDEX_TK, WEIGHTS_TK), OUT_TD)
    assert remote.events.count(("recover", 1)) == 1
    remote.events.clear()
    assert torch.equal(dispatcher(HIDDEN_TD, INDEX_TK, WEIGHTS_TK), OUT_TD)
    assert 1 not in {event[1] for event in remote.events if event[0] != "home"}


def test_the_rows_of_a_lost_worker_go_to_replicas():
    remote = MadeUpWorkers({0: (0, 1, 3), 1: (1, 2), 2: (2, 3)}, dies_before_it_answers={1})
    assert torch.equal(dispatcher_to(remote)(HIDDEN_TD, INDEX_TK, WEIGHTS_TK), OUT_TD)
    assert remote.experts == {0: (0, 1, 3), 2: (2, 3)}, "nothing was adopted"


def test_one_that_is_gone_when_asked_does_not_hold_up_the_others():
    remote = MadeUpWorkers(
        {0: (0,), 1: (1,), 2: (2, 3)}, adopters={0: 2}, dies_before_it_is_asked={0}
    )
    calls = []
    out_TD = dispatcher_to(remote)(HIDDEN_TD, INDEX_TK, WEIGHTS_TK, lambda: calls.append(1))
    assert torch.equal(out_TD, OUT_TD)
    assert [event[:2] for event in remote.events[:4]] == [
        ("send", 0),
        ("send", 1),
        ("send", 2),
        ("recover", 0),
    ]
    assert calls == [1], "other work is not done again for the rows that are sent again"


def test_only_the_pairs_of_the_lost_worker_are_computed_again():
    """Sent again to a worker that has computed other pairs of the same rows."""
    remote = MadeUpWorkers({0: (0, 1, 2), 1: (3,)}, adopters={1: 0}, dies_before_it_answers={1})
    assert torch.equal(dispatcher_to(remote)(HIDDEN_TD, INDEX_TK, WEIGHTS_TK), OUT_TD)
    assert [event for event in remote.events if event[0] == "send"] == [
        ("send", 0, 3),
        ("send", 1, 2),  # rows 0 and 2
        ("send", 0, 2),
    ]


def test_who_adopts_may_be_lost_too_and_so_may_the_next():
    remote = MadeUpWorkers(
        {0: (0,), 1: (1, 3), 2: (2,)},
        adopters={1: 2, 2: 3, 3: 0},
        dies_before_it_answers={1, 2},
        dies_before_it_is_asked={3},
    )
    assert torch.equal(dispatcher_to(remote)(HIDDEN_TD, INDEX_TK, WEIGHTS_TK), OUT_TD)
    assert remote.experts.keys() == {0}


def test_all_workers_are_lost_and_home_adopts():
    remote = MadeUpWorkers(
        {0: (0, 1), 1: (2, 3)}, adopters={0: 1, 1: 4}, dies_before_it_answers={0, 1}
    )
    assert torch.equal(dispatcher_to(remote)(HIDDEN_TD, INDEX_TK, WEIGHTS_TK), OUT_TD)
    assert set(remote.experts) == {4}


def test_when_nobody_adopts_the_caller_is_told():
    remote = MadeUpWorkers({0: (0, 1), 1: (2, 3)}, dies_before_it_answers={1})
    with pytest.raises(WorkersLostError, match="nobody adopts expert 2"):
        dispatcher_to(remote)(HIDDEN_TD, INDEX_TK, WEIGHTS_TK)


def test_a_loss_in_one_part_of_a_batch_while_the_other_waits():
    both_away = threading.Barrier(2)
    remote = MadeUpWorkers({0: (0, 1), 1: (2, 3)}, adopters={1: 0})

    def die(slot):
        both_away.wait(LONG_ENOUGH_S)
        raise remote.loss(slot)

    remote.on_wait = lambda slot: slot == 1 and die(slot)
    dispatcher = dispatcher_to(remote, interleaver=(turns := Interleaver(min_tokens=1)))
    index_TK = torch.tensor([[2, 0]])
    one_T1, weights_TK = torch.ones(1, 1), torch.ones(1, 2)
    got = turns.run([lambda: dispatcher(one_T1, index_TK, weights_TK)] * 2)
    assert [part.item() for part in got] == [101, 101]


def test_a_worker_that_cannot_compute_is_not_lost():
    def fail(slot):
        remote.on_wait = None
        raise RuntimeError(f"slot {slot} cannot compute these rows")

    remote = MadeUpWorkers({0: (0, 1), 1: (2, 3)}, on_wait=fail)
    dispatcher = dispatcher_to(remote)
    with pytest.raises(RuntimeError, match="slot 0 cannot"):
        dispatcher(HIDDEN_TD, INDEX_TK, WEIGHTS_TK)
    assert not any(event[0] == "recover" for event in remote.events)
    assert torch.equal(dispatcher(HIDDEN_TD, INDEX_TK, WEIGHTS_TK), OUT_TD)


@st.composite
def lossy_runs(draw):
    """Any placement on workers, any routing, any of the workers lost; home adopts at last."""
    slots = st.sets(st.integers(0, 3), min_size=1)
    slots_of = draw(st.lists(slots, min_size=E, max_size=E))
    experts = {
        slot: tuple(e for e in range(E) if slot in slots_of[e])
        for slot in range(4)
        if any(slot in each for each in slots_of)
    }
    order = draw(st.permutations(range(4)))
    adopters = dict(zip(order, [*order[1:], 4], strict=True))
    lost = draw(st.sets(st.integers(0, 3)))
    at_once = draw(st.sets(st.sampled_from(sorted(lost)))) if lost else set()
    token = st.permutations(range(E)).map(lambda each: each[:2])
    index = draw(st.lists(token, max_size=6))
    remote = MadeUpWorkers(
        experts,
        adopters=adopters,
        dies_before_it_is_asked=at_once,
        dies_before_it_answers=lost - at_once,
        select_tokens=draw(st.sampled_from([0, 10**9])),
    )
    return remote, torch.tensor(index, dtype=torch.int64).view(-1, 2)


@settings(deadline=None, max_examples=150)
@given(lossy_runs())
def test_whatever_is_lost_the_sums_stay_the_same(case):
    remote, index_TK = case
    num_tokens = index_TK.shape[0]
    hidden_TD = torch.arange(1.0, 2 * num_tokens + 1).view(-1, 2)
    weights_TK = torch.tensor([[1.0, 3.0]]).expand(num_tokens, 2)
    factors = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    want_TD = hidden_TD * (factors[index_TK] * weights_TK).sum(1, keepdim=True)
    dispatcher = dispatcher_to(remote)
    for _ in range(2):
        assert torch.equal(dispatcher(hidden_TD, index_TK, weights_TK), want_TD)


# Its books.


def traced(dispatcher, *rows):
    traces = []
    dispatcher.log.subscribe(traces.append)
    out_TD = dispatcher(*rows)
    (trace,) = traces
    return out_TD, trace


def parts(trace):
    return [(span.part, span.slot, span.num_bytes) for span in trace.spans]


def test_a_trace_has_each_part_of_each_slot_with_the_bytes_that_moved():
    dispatcher = dispatcher_to(MadeUpWorkers({0: (0,), 2: (2, 3), 4: (1,)}))
    out_TD, trace = traced(dispatcher, HIDDEN_TD, INDEX_TK, WEIGHTS_TK)
    assert torch.equal(out_TD, OUT_TD)
    assert (trace.layer, trace.num_experts) == (LAYER, E)
    assert torch.equal(trace.index_TK, INDEX_TK)
    assert torch.equal(trace.weights_TK, WEIGHTS_TK)
    assert parts(trace) == [
        ("dispatch", "w0", 1 * SENT_BYTES),
        ("dispatch", "w2", 3 * SENT_BYTES),
        ("compute", "master", 0),
        ("wait", "w0", 0),
        ("combine", "w0", 1 * RECEIVED_BYTES),
        ("wait", "w2", 0),
        ("combine", "w2", 3 * RECEIVED_BYTES),
        ("compute", "w0", 0),
        ("compute", "w2", 0),
    ]
    assert [span.is_home for span in trace.spans] == [True] * 7 + [False] * 2
    w0, w2, master = (trace.slots.index(name) for name in ("w0", "w2", "master"))
    assert trace.links == {
        (master, w0): SENT_BYTES,
        (master, w2): 3 * SENT_BYTES,
        (w0, master): RECEIVED_BYTES,
        (w2, master): 3 * RECEIVED_BYTES,
    }
    for span in trace.spans:
        assert span.start_s <= span.end_s
    computed = [span for span in trace.spans if (span.part, span.slot) == ("compute", "w0")]
    assert computed[0].end_s - computed[0].start_s == pytest.approx(0.25)


def test_nothing_is_written_down_while_nobody_looks():
    log = RoutingLog()
    dispatcher = dispatcher_to(MadeUpWorkers({0: (0, 1), 1: (2, 3)}), log=log)
    traces = []
    log.subscribe(traces.append)
    with log.paused():
        dispatcher(HIDDEN_TD, INDEX_TK, WEIGHTS_TK)
    assert traces == []


@pytest.mark.parametrize("when", LOSSES.values(), ids=LOSSES.keys())
def test_a_trace_of_a_loss_has_what_was_sent_again(when):
    remote = MadeUpWorkers({0: (0, 1, 2), 1: (3,)}, adopters={1: 0})
    getattr(remote, when).add(1)
    out_TD, trace = traced(dispatcher_to(remote), HIDDEN_TD, INDEX_TK, WEIGHTS_TK)
    assert torch.equal(out_TD, OUT_TD)
    assert torch.equal(trace.index_TK, INDEX_TK), "one pass of the layer, not two"
    dispatched = [each for each in parts(trace) if each[0] == "dispatch"]
    lost = 0 if when == "dies_before_it_is_asked" else 2 * SENT_BYTES
    assert dispatched == [
        ("dispatch", "w0", 3 * SENT_BYTES),
        ("dispatch", "w1", lost),
        ("dispatch", "w0", 2 * SENT_BYTES),
    ]
    received = sum(num_bytes for part, _, num_bytes in parts(trace) if part == "combine")
    assert received == (3 + 2) * RECEIVED_BYTES


def test_no_rows_leave_a_trace_too():
    dispatcher = dispatcher_to(MadeUpWorkers({0: (0, 1), 1: (2, 3)}))
    _, trace = traced(dispatcher, HIDDEN_TD[:0], INDEX_TK[:0], WEIGHTS_TK[:0])
    assert trace.index_TK.shape == (0, 2)
    assert sum(num_bytes for _, _, num_bytes in parts(trace)) == 0
