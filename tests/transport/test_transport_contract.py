"""What every transport promises its master, with workers as processes."""

import os
import signal
import threading
import time
from itertools import count

import pytest
from echo_worker import header

from moe_lightning.transport.transport import WorkerLost

_requests = count(1)


def ask(team, *payload, worker=0, request=None):
    request = next(_requests) if request is None else request
    return team.transport.ask(worker, request, [header(request), *payload])


def bytes_of(frames):
    return [bytes(frame) for frame in frames]


PAYLOADS = {
    "none": [],
    "empty": [b""],
    "four": [b"rows", b"", b"index", bytes(range(256))],
    "8 B": [b"x" * 8],
    "just copied": [os.urandom(65535), os.urandom(65536), os.urandom(65537)],
    "1 MiB": [os.urandom(2**20), os.urandom(2**20 + 1)],
    "32 MiB": [os.urandom(2**25)],
}


def test_frames_come_back_as_they_were(start_team):
    team = start_team()
    for payload in PAYLOADS.values():
        request = next(_requests)
        answer = ask(team, *payload, request=request).result(20)
        assert all(isinstance(frame, memoryview) for frame in answer)
        assert bytes_of(answer) == [header(request), *payload]


def test_many_in_flight_are_answered_whatever_is_waited_for_first(start_team):
    team = start_team(num_workers=2)
    asked = {}
    for number in range(40):
        payload = os.urandom(1 + 5000 * number)
        asked[number] = ask(team, payload, worker=number % 2), payload
    order = [*range(39, 20, -1), *range(0, 21)]
    for number in order:
        pending, payload = asked[number]
        assert bytes_of(pending.result(20))[1:] == [payload]


def test_an_answer_can_be_had_twice(start_team):
    pending = ask(start_team(), b"once")
    assert bytes_of(pending.result(20)) == bytes_of(pending.result(20))


def test_what_is_never_waited_for_is_in_nobodys_way(start_team):
    team = start_team()
    for _ in range(20):
        ask(team, os.urandom(100_000))
    assert bytes_of(ask(team, b"waited for").result(20))[1:] == [b"waited for"]


def test_threads_may_ask_at_once(start_team):
    team = start_team(num_workers=2)
    wrong = []

    def ask_many(thread):
        for number in range(60):
            payload = f"{thread} {number}".encode() * (1 + 40 * number)
            answer = ask(team, payload, worker=(thread + number) % 2).result(20)
            if bytes_of(answer)[1:] != [payload]:
                wrong.append((thread, number))
        done.append(thread)

    done = []
    threads = [threading.Thread(target=ask_many, args=(each,)) for each in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2]
    assert not wrong


def test_a_worker_handles_one_request_at_a_time(start_team):
    team = start_team("count_inside")
    inside = []

    def ask_some():
        pendings = [ask(team) for _ in range(10)]
        inside.extend(bytes(pending.result(20)[1]) for pending in pendings)

    threads = [threading.Thread(target=ask_some) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == [b"1"] * 30


@pytest.mark.parametrize("what", [b"fail", b"drop"])
def test_a_worker_outlives_requests_without_an_answer(start_team, what):
    team = start_team("refuse")
    pendings = [ask(team, each) for each in (b"before", what, b"after")]
    assert bytes_of(pendings[2].result(20))[1:] == [b"after"]
    assert bytes_of(pendings[0].result(20))[1:] == [b"before"]
    with pytest.raises(TimeoutError, match="worker 0"):
        pendings[1].result(0.2)
    if what == b"fail":
        assert any("this request fails" in line for line in team.workers[0].log)


def test_a_killed_worker_is_lost_within_a_second(start_team):
    team = start_team("sleep", num_workers=2)
    ask(team, b"0").result(20)
    in_flight = [ask(team, b"30"), ask(team, b"0")]
    other = ask(team, b"1.5", worker=1)
    time.sleep(0.3)
    team.workers[0].signal(signal.SIGKILL)
    killed_s = time.monotonic()
    for pending in in_flight:
        with pytest.raises(WorkerLost) as caught:
            pending.result(20)
        assert caught.value.worker == 0
    assert time.monotonic() - killed_s < 1.0
    started_s = time.monotonic()
    with pytest.raises(WorkerLost):
        ask(team, b"0")
    assert time.monotonic() - started_s < 0.01
    assert bytes_of(other.result(20))[1:] == [b"1.5"]
    assert bytes_of(ask(team, b"0", worker=1).result(20))[1:] == [b"0"]


def test_a_stopped_worker_is_lost_in_time_and_stays_lost(start_team):
    team = start_team("sleep", num_workers=2, timeout_s=2.0)
    ask(team, b"0").result(20)
    pending = ask(team, b"0.5")
    time.sleep(0.1)
    team.workers[0].signal(signal.SIGSTOP)
    stopped_s = time.monotonic()
    with pytest.raises(WorkerLost, match="no sign of life for 2 s"):
        pending.result(20)
    assert 1.7 < time.monotonic() - stopped_s < 2.2  # the last pong may be a quarter second old
    team.workers[0].signal(signal.SIGCONT)
    time.sleep(0.7)
    with pytest.raises(WorkerLost):
        ask(team, b"0")
    assert bytes_of(ask(team, b"0", worker=1).result(20))[1:] == [b"0"]


def test_a_short_stop_is_waited_out(start_team):
    team = start_team(timeout_s=3.0)
    ask(team, b"before").result(20)
    team.workers[0].signal(signal.SIGSTOP)
    pending = ask(team, b"meanwhile")
    time.sleep(1.5)
    team.workers[0].signal(signal.SIGCONT)
    assert bytes_of(pending.result(20))[1:] == [b"meanwhile"]


def test_a_late_answer_is_dropped(start_team):
    team = start_team("sleep")
    ask(team, b"0").result(20)
    late = ask(team, b"0.5")
    started_s = time.monotonic()
    with pytest.raises(TimeoutError, match="worker 0"):
        late.result(0.2)
    assert 0.2 <= time.monotonic() - started_s < 0.3
    assert bytes_of(ask(team, b"0").result(20))[1:] == [b"0"]


def test_waiting_can_be_taken_up_again(start_team):
    pending = ask(start_team("sleep"), b"0.5")
    for _ in range(2):
        with pytest.raises(TimeoutError, match="worker 0"):
            pending.result(0.05)
    assert bytes_of(pending.result(20))[1:] == [b"0.5"]


def test_asking_does_not_wait_for_the_network(start_team):
    team = start_team("sleep")
    ask(team, b"0").result(20)
    ask(team, b"2")
    payload = bytes(2**24)
    started_s = time.monotonic()
    for _ in range(4):
        ask(team, b"0", payload)
    assert time.monotonic() - started_s < 1.0


def test_a_busy_worker_is_not_lost(start_team):
    # One thread computes, and holds the interpreter now and then; the pulse is another's.
    team = start_team("compute", timeout_s=1.0)
    pending = ask(team, b"3")
    assert bytes_of(pending.result(20))[1:] == [b"3"]
    assert team.liveness.lost(0) is None


def test_closing_waits_for_nobody(start_team):
    team = start_team("sleep")
    ask(team, b"0").result(20)
    outcome = []

    def wait():
        try:
            outcome.append(ask(team, b"30").result(60))
        except WorkerLost as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    pending = ask(team, b"30", os.urandom(2**22))
    time.sleep(0.3)
    started_s = time.monotonic()
    team.transport.close()
    assert time.monotonic() - started_s < 0.5
    thread.join(1.0)
    assert isinstance(outcome[0], WorkerLost)
    for again in (lambda: pending.result(20), lambda: ask(team, b"0")):
        with pytest.raises(WorkerLost, match="closed"):
            again()
    team.transport.close()
