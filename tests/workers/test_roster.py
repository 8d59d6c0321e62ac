"""Meeting workers: all of them, in any order, or a clear error; and their control messages."""

import threading
import time

import pytest
from worker_threads import thread_worker

import moe_lightning
from moe_lightning.errors import UsageError
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.manifest import manifest_hash
from moe_lightning.transport.messages import Failure, FailureCode, Reply, parse
from moe_lightning.transport.zmq_server import ZmqServer
from moe_lightning.workers.roster import Roster
from moe_lightning.workers.session import WorkerSession

LONG_ENOUGH_S = 20


@pytest.fixture
def stranger(tmp_path):
    """An address where every request gets the answer ``answer(message)``."""
    servers = []

    def stranger(answer):
        server = ZmqServer(f"ipc://{tmp_path}/stranger{len(servers)}")
        is_over = threading.Event()
        thread = threading.Thread(
            target=server.serve,
            args=(lambda frames: answer(parse(frames)), lambda: not is_over.is_set()),
        )
        thread.start()
        servers.append((server, is_over, thread))
        return server.address

    yield stranger
    for server, is_over, thread in servers:
        is_over.set()
        thread.join(LONG_ENOUGH_S)
        server.close()


def test_workers_are_met_and_told_goodbye(worker_threads, checkpoint, meet):
    addresses = worker_threads(checkpoint, 2)
    roster = meet(addresses)
    assert sorted(roster.offers) == [0, 1]
    assert all(offer["device"] == "cpu" for offer in roster.offers.values())
    assert [roster.liveness.lost(worker) for worker in (0, 1)] == [None, None]
    roster.close()
    assert sorted(meet(addresses).offers) == [0, 1], "they are free again"


def test_every_run_has_a_number_of_its_own():
    sessions = {Roster([], keys=None, timeout_s=1).session for _ in range(20)}
    assert len(sessions) == 20
    assert all(0 < session < 2**63 for session in sessions)


@pytest.mark.parametrize("last", [0, 1])
def test_a_worker_that_was_there_first_waits_for_the_last_one(last, checkpoint, tmp_path):
    """Longer than it would wait for a silent master."""
    addresses = [f"ipc://{tmp_path}/{n}" for n in range(2)]
    met = []

    def meet():
        roster = Roster(addresses, keys=None, timeout_s=0.5)
        with open_checkpoint(str(checkpoint)) as view:
            manifest = manifest_hash(view)
        roster.meet(manifest, join_timeout_s=LONG_ENOUGH_S, still_starting=lambda: None)
        met.append(roster)

    thread = threading.Thread(target=meet)
    with thread_worker(checkpoint, listen=addresses[1 - last]):
        thread.start()
        time.sleep(1.5)
        assert not met
        with thread_worker(checkpoint, listen=addresses[last]):
            thread.join(LONG_ENOUGH_S)
            (roster,) = met
            for worker in (0, 1):
                answer = roster.answer(roster.tell(worker, "load", {}), LONG_ENOUGH_S)
                assert answer.code is FailureCode.LOAD, "it serves this session"
            roster.close()


def test_a_worker_that_is_not_there_is_named_in_time(worker_threads, checkpoint, meet, tmp_path):
    there = worker_threads(checkpoint, 1)
    absent = [f"ipc://{tmp_path}/nobody", "tcp://127.0.0.1:9"]
    start_s = time.monotonic()
    with pytest.raises(UsageError) as error:
        meet([absent[0], *there, absent[1]], join_timeout_s=1.2)
    assert 1.1 < time.monotonic() - start_s < 2.5
    said = str(error.value)
    assert f"no answer within 1 s from {absent[0]} (no connection), {absent[1]} (" in said
    assert there[0] not in said
    assert "join_timeout_s" in said
    assert sorted(meet(there).offers) == [0], "who was met is free again"


def test_waiting_ends_when_a_worker_will_never_come(tmp_path):
    roster = Roster([f"ipc://{tmp_path}/nobody"], keys=None, timeout_s=1)
    looks = []

    def still_starting():
        looks.append(1)
        if len(looks) == 3:
            raise RuntimeError("it has ended")

    with pytest.raises(RuntimeError, match="it has ended"):
        roster.meet("hash", join_timeout_s=LONG_ENOUGH_S, still_starting=still_starting)
    roster.close()


def test_a_worker_that_serves_another_master_refuses(worker_threads, checkpoint, meet):
    addresses = worker_threads(checkpoint, 1)
    meet(addresses)
    start_s = time.monotonic()
    with pytest.raises(UsageError) as error:
        meet(addresses, timeout_s=1)
    assert time.monotonic() - start_s > 1.2, "it was asked again: its master might be gone"
    assert f"worker {addresses[0]} refuses this run: it serves another master" in str(error.value)


def test_another_checkpoint_is_refused(worker_threads, checkpoint, meet):
    addresses = worker_threads(checkpoint, 1)
    with pytest.raises(UsageError, match="manifest: the master has 0123, this worker"):
        meet(addresses, manifest="0123")
    meet(addresses)


def test_another_release_is_refused(worker_threads, checkpoint, meet, monkeypatch):
    addresses = worker_threads(checkpoint, 1)
    real = WorkerSession.handle

    def handle(self, frames):
        with monkeypatch.context() as patch:
            patch.setattr(moe_lightning, "__version__", "0.0.1")
            return real(self, frames)

    with monkeypatch.context() as patch:
        patch.setattr(WorkerSession, "handle", handle)
        addresses = [*addresses]
        with thread_worker(checkpoint) as worker, pytest.raises(UsageError) as error:
            meet([worker.address])
    assert f"version: the master has {moe_lightning.__version__}, this worker 0.0.1" in str(
        error.value
    )


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"pulse": 1, "pool": "p", "device": "cpu", "free_bytes": 1, "host": "h"},
        {"pulse": "ipc://x", "pool": "p", "device": "cpu", "free_bytes": "1", "host": "h"},
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(body, stranger, meet):
    address = stranger(lambda hello: Reply(hello.session, hello.request, body).frames())
    with pytest.raises(UsageError, match=f"{address} gave an answer that makes no sense"):
        meet([address])


@pytest.mark.parametrize(
    "frames",
    [
        lambda hello: Failure(
            hello.session, hello.request, FailureCode.REFUSED, "not you"
        ).frames(),
        lambda hello: [*Reply(hello.session, hello.request, {}).frames(), b"more"],
    ],
)
def test_a_stranger_at_the_address_is_an_error_and_no_crash(frames, stranger, meet):
    address = stranger(frames)
    with pytest.raises((UsageError, moe_lightning.errors.WorkersLostError)):
        meet([address])


def test_only_the_port_of_a_workers_pulse_is_believed(stranger, meet):
    """A worker cannot make its master dial a host of its choice."""
    said = {"pool": "p", "device": "cpu", "free_bytes": 1, "host": "h", "torch": "2"}
    body = {**said, "pulse": "tcp://192.0.2.1:7001"}
    server = ZmqServer("tcp://127.0.0.1:0")
    is_over = threading.Event()

    def answer(frames):
        hello = parse(frames)
        return Reply(hello.session, hello.request, body).frames()

    thread = threading.Thread(target=server.serve, args=(answer, lambda: not is_over.is_set()))
    thread.start()
    try:
        roster = Roster([server.address], keys=None, timeout_s=1)
        watched = []
        roster.liveness.watch = lambda *args: watched.append(args)
        roster.meet("hash", join_timeout_s=LONG_ENOUGH_S, still_starting=lambda: None)
        assert watched == [(0, server.address, "tcp://127.0.0.1:7001")]
        roster.close()
    finally:
        is_over.set()
        thread.join(LONG_ENOUGH_S)
        server.close()


def test_an_order_that_cannot_be_done_is_told(worker_threads, checkpoint, meet):
    addresses = worker_threads(checkpoint, 1)
    roster = meet(addresses)
    with pytest.raises(UsageError, match=f"worker {addresses[0]} cannot dance: unknown verb"):
        roster.order(0, "dance", {})
    roster.order(0, "bye", {})
    with pytest.raises(UsageError, match="it has been restarted, or serves another master"):
        roster.order(0, "bye", {})


def test_closing_does_not_wait_for_the_dead(checkpoint, meet):
    with thread_worker(checkpoint) as worker:
        roster = meet([worker.address])
        worker.end()
        start_s = time.monotonic()
        roster.close()
        assert time.monotonic() - start_s < 2
