"""The fleet with workers in threads: right sums by any placement, and what becomes of losses."""

import logging
import re
import threading
from contextlib import ExitStack

import pytest
import torch
from masters import EXPERT_BYTES, LAYERS, placed
from worker_threads import thread_worker

from moe_lightning.errors import WorkersLostError
from moe_lightning.transport.messages import Sums
from moe_lightning.workers import fleet as fleet_module
from moe_lightning.workers.expert_host import ExpertHost
from moe_lightning.workers.question import WireOptions
from moe_lightning.workers.session import WorkerSession

LONG_ENOUGH_S = 20
ROW_BYTES = 32 * 4


@pytest.fixture
def workers(worker_threads, checkpoint):
    """Addresses of so many workers."""
    return lambda num_workers, **options: worker_threads(checkpoint, num_workers, **options)


PLACEMENTS = {
    "one worker": placed(range(8)),
    "two": placed((0, 1, 2, 3), (4, 5, 6, 7)),
    "three, uneven": placed((0, 7), (1, 2, 3, 4, 5), (6,)),
    "one is empty": placed((1, 3, 5, 7), (), (0, 2, 4, 6)),
    "replicas": placed((0, 1, 2, 3, 4), (3, 4, 5, 6), (0, 3, 6, 7)),
    "the last slot is the master": placed((0, 1, 2), (3, 4), (), (5, 6, 7)),
}


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_sums_of_any_placement_are_those_of_the_family(placement, workers, master, check_sums):
    made = master(workers(min(placement.num_slots, 3)), placement)
    for num_rows in (37, 1, 0):
        check_sums(made, num_rows=num_rows)
    assert made.fleet.lost == {}


@pytest.fixture
def sizes(monkeypatch):
    """How many rows each message had that any worker has computed."""
    sizes, real = [], ExpertHost.compute

    def compute(self, layer, rows_RD, *rest):
        sizes.append(len(rows_RD))
        return real(self, layer, rows_RD, *rest)

    monkeypatch.setattr(ExpertHost, "compute", compute)
    return sizes


@pytest.mark.parametrize(("rows_each", "num_messages"), [(1, 37), (10, 4), (36, 2), (37, 1)])
def test_many_rows_go_in_several_messages(
    rows_each, num_messages, workers, master, check_sums, sizes
):
    wire = WireOptions(message_bytes=rows_each * ROW_BYTES)
    made = master(workers(1), placed(range(8)), wire=wire)
    check_sums(made)
    assert len(sizes) == num_messages * len(LAYERS)
    assert sum(sizes) == 37 * len(LAYERS)
    assert max(sizes) <= rows_each
    check_sums(made, num_rows=0)


def test_a_trace_counts_the_bytes_of_all_messages(workers, master, rows):
    moved = []
    for message_bytes in (10**9, 10 * ROW_BYTES):
        wire = WireOptions(message_bytes=message_bytes)
        made, traces = master(workers(1), placed(range(8)), wire=wire), []
        made.log.subscribe(traces.append)
        made.compute(0, *rows(37))
        moved.append({span.part: span.num_bytes for span in traces[0].spans})
        assert [span.part for span in traces[0].spans] == ["dispatch", "wait", "combine", "compute"]
        made.fleet.close()
    # A row, three experts in int16, and three float weights; three more headers.
    assert moved[0]["dispatch"] > 37 * (ROW_BYTES + 3 * 2 + 3 * 4)
    header = (moved[1]["dispatch"] - moved[0]["dispatch"]) / 3
    assert moved[0]["dispatch"] == 37 * (ROW_BYTES + 3 * 2 + 3 * 4) + header
    assert moved[0]["combine"] == moved[1]["combine"] == 37 * ROW_BYTES


def test_a_loss_between_messages_of_the_same_rows(workers, master, check_sums, monkeypatch):
    wire = WireOptions(message_bytes=10 * ROW_BYTES)
    made = master(workers(2), placed((0, 1, 2, 3), (4, 5, 6, 7)), wire=wire)
    real, num_asked = ExpertHost.compute, []

    def compute(self, *rows):
        num_asked.append(1)
        if len(num_asked) == 3:
            made.lose(1)
        return real(self, *rows)

    monkeypatch.setattr(ExpertHost, "compute", compute)
    check_sums(made)
    assert set(made.fleet.lost) == {1}


def test_two_masters_one_after_the_other(workers, master, check_sums):
    """Workers are free again after a run, and hold what the next run says."""
    for placement in (placed((0, 1, 2), (3, 4, 5, 6, 7)), placed((5, 6, 7), (0, 1, 2, 3, 4))):
        made = master(workers(2), placement)
        check_sums(made)
        made.fleet.close()


def test_the_report_names_the_workers(workers, master):
    addresses = workers(2)
    made = master(addresses, placed((0, 1, 2, 3), (4, 5, 6, 7)))
    report = made.fleet.report()
    assert [worker["address"] for worker in report["workers"]] == addresses
    assert {worker["device"] for worker in report["workers"]} == {"cpu"}
    assert {worker["torch"] for worker in report["workers"]} == {torch.__version__}
    assert report["workers_lost"] == []
    made.lose(1, "it fell")
    made.fleet.recover(1)
    assert made.fleet.report()["workers_lost"] == [{"address": addresses[1], "reason": "it fell"}]


# Losses.


def test_the_experts_of_a_lost_worker_are_adopted(workers, master, check_sums, caplog):
    made = master(workers(3), placed((0, 1), (2, 3, 4), (5, 6, 7)))
    check_sums(made)
    made.lose(2)
    with caplog.at_level(logging.WARNING, "moe_lightning.fleet"):
        check_sums(made)
    (lost,) = [record for record in caplog.messages if "is lost" in record]
    assert "made up" in lost
    # Each layer's orphans 5, 6, 7: two to worker 0, which held 2, and then one to either.
    adopted = [record for record in caplog.messages if "adopted" in record]
    assert len(adopted) == 2
    assert "6 experts (layer 0: 5, 6; layer 1: 5, 6; layer 2: 5, 6)" in adopted[0]
    assert "3 experts (layer 0: 7; layer 1: 7; layer 2: 7)" in adopted[1]
    check_sums(made)
    assert made.fleet.lost == {2: "made up"}


def test_one_after_the_other_is_lost_until_one_is_left(workers, master, check_sums):
    made = master(workers(3), placed((0, 1), (2, 3, 4), (5, 6, 7)))
    for worker in (1, 0):
        made.lose(worker)
        check_sums(made)
    assert set(made.fleet.lost) == {0, 1}


def test_replicas_step_in_and_nothing_is_read(workers, master, check_sums, monkeypatch):
    made = master(workers(3), placed(range(5), range(3, 8), (*range(3), *range(5, 8))))
    monkeypatch.setattr(ExpertHost, "load", lambda *_: pytest.fail("nothing is to be loaded"))
    made.lose(1)
    check_sums(made)


def test_a_worker_is_lost_while_many_threads_ask(workers, master, rows, expected):
    made = master(workers(3), placed((0, 1, 2), (3, 4, 5), (6, 7)))
    some = rows(101)
    want = {layer: expected(layer, *some) for layer in LAYERS}
    begin, problems = threading.Barrier(4), []

    def ask(number):
        begin.wait(LONG_ENOUGH_S)
        try:
            for layer in LAYERS * 6:
                got_TD = made.compute(layer, *some)
                torch.testing.assert_close(got_TD, want[layer], atol=1e-6, rtol=1e-5)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    begin.wait(LONG_ENOUGH_S)
    made.lose(1)
    for thread in threads:
        thread.join(LONG_ENOUGH_S)
        assert not thread.is_alive()
    assert problems == []
    assert set(made.fleet.lost) == {1}


def test_a_worker_that_serves_the_run_no_more_is_lost(workers, master, check_sums):
    """It has been restarted, or has given this master up: it answers, but holds nothing."""
    addresses = workers(2)
    made = master(addresses, placed((0, 1, 2, 3), (4, 5, 6, 7)))
    roster = made.fleet.roster
    roster.answer(roster.tell(1, "bye", {}), 10)
    check_sums(made)
    assert list(made.fleet.lost) == [1]
    assert re.search("serves", made.fleet.lost[1])


def test_a_worker_is_lost_while_it_loads(workers, master, check_sums):
    made = master(workers(3))
    wait = made.start_loading(placed((0, 1), (2, 3, 4), (5, 6, 7)))
    made.lose(0)
    wait()
    check_sums(made)
    assert set(made.fleet.lost) == {0}


def test_who_adopts_while_all_load_is_asked_for_no_more_than_it_has_room_for(
    checkpoint, master, check_sums
):
    """What a worker offered when it was met is less by what it loads at first."""
    with ExitStack() as stack:
        addresses = [
            stack.enter_context(thread_worker(checkpoint, memory_gb=num * EXPERT_BYTES / 1e9))
            for num in (24, 9 + 2, 9 + 4)
        ]
        made = master([worker.address for worker in addresses], expert_bytes=EXPERT_BYTES)
        wait = made.start_loading(placed((0, 1), (2, 3, 4), (5, 6, 7)))
        made.lose(0)
        wait()
        check_sums(made)
        assert set(made.fleet.lost) == {0}


def test_a_worker_that_gives_nonsense_for_sums_is_lost(workers, master, check_sums, monkeypatch):
    made = master(workers(2), placed((0, 1, 2, 3), (4, 5, 6, 7)))
    real, wrong = WorkerSession.compute, []

    def compute(self, question):
        if wrong:
            return real(self, question)
        wrong.append(1)
        empty = memoryview(b"")
        return Sums(
            question.session,
            question.request,
            num_rows=0,
            width=question.width,
            sums_dtype=question.sums_dtype,
            compute_us=0,
            waited_us=0,
            error=float("nan"),
            rows=empty,
            scales=empty,
        ).frames()

    monkeypatch.setattr(WorkerSession, "compute", compute)
    check_sums(made)
    assert list(made.fleet.lost.values()) == ["its answer is to another question"]


@pytest.mark.parametrize("num_rows_missing", [0, 1])
def test_a_worker_that_fails_at_some_rows_is_not_lost(
    num_rows_missing, workers, master, check_sums, rows, monkeypatch
):
    """The next worker would fail as well: the rows are to blame, and are told so."""
    made = master(workers(2), placed((0, 1, 2, 3), (4, 5, 6, 7)))
    real = ExpertHost.compute

    def compute(self, *rows):
        if num_rows_missing == 0:
            raise ValueError("these rows are bad")
        return real(self, *rows)[num_rows_missing:]

    with monkeypatch.context() as patch:
        patch.setattr(ExpertHost, "compute", compute)
        with pytest.raises(RuntimeError, match=r"these rows are bad|rows: \d+ bytes instead of"):
            made.compute(0, *rows(32))
    assert made.fleet.lost == {}
    check_sums(made)


def test_loading_may_take_longer_than_one_look(workers, master, check_sums, monkeypatch):
    monkeypatch.setattr(fleet_module, "LOOK_AGAIN_S", 0.05)
    slow = threading.Event()
    real = ExpertHost.load

    def load(self, *args, **options):
        slow.wait(0.3)
        real(self, *args, **options)

    monkeypatch.setattr(ExpertHost, "load", load)
    made = master(workers(2), placed((0, 1, 2, 3), (4, 5, 6, 7)))
    assert made.fleet.lost == {}
    check_sums(made)


def test_a_worker_that_is_stuck_while_it_loads_is_given_up(
    workers, master, check_sums, monkeypatch
):
    monkeypatch.setattr(fleet_module, "LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr(fleet_module, "STUCK_S", 0.4)
    is_over, real, stuck = threading.Event(), ExpertHost.load, []

    def load(self, experts, **options):
        if 7 in experts.get(0, ()) and not stuck:
            stuck.append(self)
            is_over.wait(LONG_ENOUGH_S)
        real(self, experts, **options)

    monkeypatch.setattr(ExpertHost, "load", load)
    try:
        made = master(workers(2), placed((0, 1, 2, 3), (4, 5, 6, 7)))
        check_sums(made)
    finally:
        is_over.set()
    assert made.fleet.lost == {1: "it read nothing for 0 s while it loaded its experts"}


# Who adopts, and who does not.


def test_a_survivor_that_cannot_load_is_passed_over(
    workers, master, check_sums, monkeypatch, caplog
):
    made = master(workers(3), placed((0, 1), (2, 3, 4), (5, 6, 7)))
    real, refused = ExpertHost.load, []

    def load(self, experts, **options):
        if not refused:
            refused.append(experts)
            raise ValueError("the disk is broken")
        real(self, experts, **options)

    monkeypatch.setattr(ExpertHost, "load", load)
    made.lose(2)
    with caplog.at_level(logging.WARNING, "moe_lightning.fleet"):
        check_sums(made)
    assert any("the disk is broken" in message for message in caplog.messages)
    assert set(made.fleet.lost) == {2}, "it still computes what it holds"


def test_the_master_adopts_what_nobody_else_can(workers, master, check_sums, monkeypatch):
    made = master(workers(2), placed((0, 1, 2), (3, 4, 5), (6, 7)), master_adopts=True)

    def refuse(*_, **__):
        raise ValueError("no room")

    monkeypatch.setattr(ExpertHost, "load", refuse)
    made.lose(1)
    check_sums(made)
    assert made.read_at_home == [{layer: ids for layer in LAYERS} for ids in ([6, 7], [3, 4, 5])]


def test_the_master_adopts_the_experts_of_all_workers(workers, master, check_sums):
    made = master(workers(2), placed((0, 1, 2, 3), (4, 5, 6, 7)), master_adopts=True)
    made.lose(0)
    made.lose(1)
    check_sums(made)
    assert [sorted(each[0]) for each in made.read_at_home[1:]] == [list(range(8))]


def test_a_survivor_without_room_adopts_what_fits_and_the_master_the_rest(
    workers, master, check_sums
):
    # As if one expert took so much that a survivor has room for two.
    made = master(workers(2), placed((0, 1, 2, 3), (4, 5, 6, 7)), master_adopts=True)
    room = made.fleet.roster.offers[0]["free_bytes"]
    made.fleet._expert_bytes = [dict.fromkeys(LAYERS, room // 2)] * 2
    made.lose(1)
    check_sums(made)
    assert made.read_at_home[1:] == [{0: [6, 7], 1: [4, 5, 6, 7], 2: [4, 5, 6, 7]}]


def test_when_nobody_can_adopt_the_error_names_worker_layers_and_experts(workers, master, rows):
    addresses = workers(2)
    made = master(addresses, placed((0, 1, 2, 3, 5), (4, 6, 7)), expert_bytes=10**15)
    made.lose(1, "no sign of life for 15 s")
    with pytest.raises(WorkersLostError) as error:
        made.compute(1, *rows())
    assert error.value.exit_code == 6
    said = str(error.value)
    assert f"{addresses[1]} (no sign of life for 15 s)" in said
    assert "9 experts (layer 0: 4, 6, 7; layer 1: 4, 6, 7; layer 2: 4, 6, 7)" in said
    assert addresses[0] not in said
    assert "master_adopts" in said


def test_when_all_are_lost_all_are_named(workers, master, rows):
    addresses = workers(2)
    made = master(addresses, placed((0, 1, 2, 3), (4, 5, 6, 7)))
    made.lose(0, "it fell")
    made.lose(1, "it sleeps")
    with pytest.raises(WorkersLostError) as error:
        made.compute(0, *rows())
    assert f"lost {addresses[0]} (it fell); {addresses[1]} (it sleeps)" in str(error.value)
    assert "24 experts" in str(error.value)


def test_a_worker_that_cannot_load_at_first_ends_the_run(workers, master, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("the disk is broken")

    monkeypatch.setattr(ExpertHost, "load", refuse)
    addresses = workers(2)
    with pytest.raises(WorkersLostError, match="the disk is broken") as error:
        master(addresses, placed((0, 1, 2, 3), (4, 5, 6, 7)))
    assert addresses[0] in str(error.value)
