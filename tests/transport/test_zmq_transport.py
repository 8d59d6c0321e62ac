"""The master's end of zmq, on connections that break, and with keys that do not fit."""

import gc
import os
import random
import socket
import threading
import time
import weakref
from contextlib import ExitStack
from itertools import count

import pytest
import zmq
from echo_worker import MAX_FRAME_BYTES, header
from proxies import TcpProxy

from moe_lightning.transport.addresses import split
from moe_lightning.transport.keys import Keys, new_keys
from moe_lightning.transport.transport import WorkerLost

_requests = count(1)


@pytest.fixture
def proxy():
    """Put a proxy before an address."""
    with ExitStack() as stack:

        def start(address, cuts=()):
            proxy = TcpProxy(split(address), cuts)
            stack.callback(proxy.close)
            return proxy

        yield start


@pytest.fixture
def fake_worker():
    """A ROUTER whose answers the test itself makes."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.rcvtimeo = 5000
        router.bind("tcp://127.0.0.1:0")
        yield router


def ask(transport, *payload, worker=0):
    request = next(_requests)
    return transport.ask(worker, request, [header(request), *payload])


def payload_of(answer):
    return [bytes(frame) for frame in answer[1:]]


def cuts_in(sizes, direction):
    return [(direction, num_bytes) for num_bytes in sizes]


# A greeting has 64 bytes, its first 10 are told apart; then come a handshake and the message.
_EARLY = [0, 1, 9, 10, 11, 12, 63, 64, 65, 66, 70, 90, 91, 92, 93, 100, 110, 120, 150, 200]
_LATE = [300, 500, 800, 1000, 4096, 10_000, 65_536, 100_000, 199_000, 200_000, 200_100, 200_120]


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_connections_cut_at_any_byte_still_bring_the_answer(
    start_worker, connect, proxy, keys_dir, direction, with_keys
):
    keys_dir = keys_dir if with_keys else None
    keys = Keys.load(keys_dir, "master") if with_keys else None
    worker = start_worker(keys_dir=keys_dir)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    sizes = [*_EARLY, *_LATE, *random.Random(seed).sample(range(200_200), 8)]
    payload = os.urandom(200_000)

    def ask_through_cuts(sizes):
        between = proxy(worker.address, cuts_in(sizes, direction))
        pending = ask(connect(between.address, keys=keys), payload)
        answers.append((sizes, payload_of(pending.result(20)) == [payload]))

    # Each cut costs the redial's interval, so five masters go through eight cuts each.
    answers = []
    threads = [
        threading.Thread(target=ask_through_cuts, args=(sizes[first::5],)) for first in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 5
    assert all(is_right for _, is_right in answers)


def test_what_was_asked_before_a_cut_is_asked_again_after_it(start_worker, connect, proxy):
    worker = start_worker("sleep")
    between = proxy(worker.address)
    transport = connect(between.address)
    ask(transport, b"0").result(10)
    pendings = [ask(transport, b"0.3", str(number).encode()) for number in range(4)]
    time.sleep(0.1)
    between.cut_all()
    for number, pending in reversed(list(enumerate(pendings))):
        assert payload_of(pending.result(10)) == [b"0.3", str(number).encode()]


def test_only_what_is_unanswered_is_asked_again(start_worker, connect, proxy):
    worker = start_worker("count")
    between = proxy(worker.address)
    transport = connect(between.address)
    frames = [header(next(_requests)), b"asked twice"]

    def times():
        request = int.from_bytes(frames[0][16:], "little")
        return transport.ask(0, request, frames)

    assert payload_of(times().result(10)) == [b"1"]
    between.cut_all()
    time.sleep(0.3)
    assert payload_of(ask(transport, b"another").result(10)) == [b"1"]
    assert payload_of(times().result(10)) == [b"2"]


def test_cuts_while_nothing_is_under_way_are_mended(start_worker, connect, proxy):
    between = proxy(start_worker().address)
    transport = connect(between.address)
    for _ in range(5):
        started_s = time.monotonic()
        assert payload_of(ask(transport, b"x").result(10)) == [b"x"]
        assert time.monotonic() - started_s < 1.0
        between.cut_all()


def test_a_cut_to_one_worker_does_not_wait_for_another(start_worker, connect, proxy):
    slow, quick = start_worker("sleep"), start_worker("sleep")
    between = proxy(quick.address)
    transport = connect(slow.address, between.address)
    for worker in (0, 1):
        ask(transport, b"0", worker=worker).result(10)
    pendings = [ask(transport, b"1.5"), ask(transport, b"0.8", worker=1)]
    time.sleep(0.1)
    between.cut_all()
    pendings[0].result(10)
    # It has been asked again while the other was waited for.
    assert payload_of(pendings[1].result(0.8)) == [b"0.8"]


def test_an_answer_from_before_a_cut_is_taken(start_worker, connect, proxy):
    slow, counting = start_worker("sleep"), start_worker("count")
    between = proxy(counting.address)
    transport = connect(slow.address, between.address)
    pendings = [ask(transport, b"1"), ask(transport, b"x", worker=1)]
    time.sleep(0.3)
    between.cut_all()
    pendings[0].result(10)  # meanwhile the other line is mended, with an answer waiting in it
    assert payload_of(pendings[1].result(10)) == [b"1"]


def test_what_is_asked_after_a_cut_is_asked_once(fake_worker, connect, proxy):
    between = proxy(fake_worker.last_endpoint.decode())
    transport = connect(between.address)
    pending = ask(transport, b"before")
    fake_worker.send_multipart(fake_worker.recv_multipart())
    pending.result(10)
    between.cut_all()
    time.sleep(0.3)
    pending = ask(transport, b"after")
    with pytest.raises(TimeoutError):
        pending.result(0.5)
    fake_worker.send_multipart(fake_worker.recv_multipart())
    assert payload_of(pending.result(10)) == [b"after"]
    assert not fake_worker.poll(300)


def test_what_is_answered_is_let_go_of(start_worker, connect):
    class Payload(bytearray):
        """Unlike a bytearray, it can be watched."""

    payload = Payload(10**6)
    watched = weakref.ref(payload)
    pending = ask(connect(start_worker().address), payload)
    del payload
    pending.result(10)
    time.sleep(0.1)
    assert watched() is None


def test_a_worker_that_starts_late_is_found(connect, start_worker, tmp_path):
    address = f"ipc://{tmp_path}/late"
    transport = connect(address)
    pending = ask(transport, b"x")
    with pytest.raises(TimeoutError, match="no connection"):
        ask(transport, b"y").result(0.3)
    start_worker(address=address)
    assert payload_of(pending.result(10)) == [b"x"]


def test_a_worker_that_comes_back_is_asked_again(connect, start_worker):
    worker = start_worker("sleep")
    transport = connect(worker.address)
    ask(transport, b"0").result(10)
    pending = ask(transport, b"0.2")
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(TimeoutError, match="connection broke"):
        ask(transport, b"0").result(0.5)
    start_worker("sleep", address=worker.address)
    assert payload_of(pending.result(10)) == [b"0.2"]


def test_a_dead_direction_is_a_timeout(start_worker, connect, proxy):
    between = proxy(start_worker().address)
    transport = connect(between.address)
    ask(transport, b"x").result(10)
    for direction in ("up", "down"):
        between.is_open[direction].clear()
        started_s = time.monotonic()
        with pytest.raises(TimeoutError):
            ask(transport, b"x").result(0.5)
        assert time.monotonic() - started_s < 0.65
        between.is_open[direction].set()
        assert payload_of(ask(transport, b"y").result(10)) == [b"y"]


def test_a_slow_link_brings_large_messages(start_worker, connect, proxy):
    between = proxy(start_worker().address)
    transport = connect(between.address)
    payload = os.urandom(2**20)
    ask(transport, b"x").result(10)
    between.delay_s = 0.02
    assert payload_of(ask(transport, payload).result(20)) == [payload]
    assert between.num_connections == 1


def test_late_double_and_unknown_answers_are_dropped(fake_worker, connect):
    transport = connect(fake_worker.last_endpoint.decode())
    first = ask(transport, b"first")
    second = ask(transport, b"second")
    peer, first_header, _ = fake_worker.recv_multipart()
    _, second_header, _ = fake_worker.recv_multipart()
    with pytest.raises(TimeoutError):
        first.result(0.05)
    del first
    for frames in (
        [first_header, b"late"],
        [header(2**64 - 1), b"unknown"],
        [header(0), b"unknown"],
        [second_header, b"right"],
        [second_header, b"double"],
        [first_header, b"late and double"],
    ):
        fake_worker.send_multipart([peer, *frames])
    assert payload_of(second.result(5)) == [b"right"]
    third = ask(transport, b"third")
    _, third_header, _ = fake_worker.recv_multipart()
    fake_worker.send_multipart([peer, third_header, b"third"])
    assert payload_of(third.result(5)) == [b"third"]
    assert payload_of(second.result(5)) == [b"right"]


def test_answers_in_another_order_find_their_questions(fake_worker, connect):
    transport = connect(fake_worker.last_endpoint.decode())
    pendings = [ask(transport, str(number).encode()) for number in range(10)]
    messages = [fake_worker.recv_multipart() for _ in pendings]
    for message in random.Random(0).sample(messages, 10):
        fake_worker.send_multipart(message)
    for number, pending in enumerate(pendings):
        assert payload_of(pending.result(5)) == [str(number).encode()]


@pytest.mark.parametrize(
    "nonsense",
    [[b""], [b"", b"", b""], [b"short"], [b"x" * 23], [b"x" * 24], [os.urandom(50)] * 5],
)
def test_answers_that_are_none_are_dropped(fake_worker, connect, nonsense):
    transport = connect(fake_worker.last_endpoint.decode())
    pending = ask(transport)
    peer, right_header = fake_worker.recv_multipart()
    fake_worker.send_multipart([peer, *nonsense])
    fake_worker.send_multipart([peer, right_header, b"right"])
    assert payload_of(pending.result(5)) == [b"right"]


def test_an_answer_of_too_many_frames_is_dropped(fake_worker, connect):
    transport = connect(fake_worker.last_endpoint.decode())
    pending = ask(transport)
    peer, right_header = fake_worker.recv_multipart()
    fake_worker.send_multipart([peer, right_header] + [b"x"] * 10_000)
    fake_worker.send_multipart([peer, right_header, b"right"])
    assert payload_of(pending.result(5)) == [b"right"]


def test_an_answer_that_is_too_long_is_never_taken_in(fake_worker, connect):
    transport = connect(fake_worker.last_endpoint.decode(), max_frame_bytes=10_000)
    pending = ask(transport)
    peer, right_header = fake_worker.recv_multipart()
    fake_worker.send_multipart([peer, right_header, bytes(10_001)])
    with pytest.raises(TimeoutError):
        pending.result(0.3)
    # The question has been asked again on another connection.
    other_peer, same_header = fake_worker.recv_multipart()
    assert other_peer != peer
    assert same_header == right_header
    fake_worker.send_multipart([other_peer, right_header, bytes(10_000)])
    assert payload_of(pending.result(5)) == [bytes(10_000)]


def test_a_request_that_no_worker_would_take_is_not_sent(start_worker, connect):
    transport = connect(start_worker().address, max_frame_bytes=MAX_FRAME_BYTES)
    with pytest.raises(AssertionError, match="split the request"):
        ask(transport, bytes(MAX_FRAME_BYTES + 1))
    assert payload_of(ask(transport, bytes(MAX_FRAME_BYTES)).result(20)) == [bytes(MAX_FRAME_BYTES)]


def test_asking_a_lost_worker_raises_at_once(start_worker, connect):
    reasons = {}
    transport = connect(*(start_worker().address for _ in range(2)), lost=reasons.get)
    pending = ask(transport, b"x")
    pending.result(10)
    reasons[0] = "somebody says so"
    with pytest.raises(WorkerLost, match="worker 0: somebody says so"):
        ask(transport, b"x")
    assert payload_of(pending.result(10)) == [b"x"]
    assert payload_of(ask(transport, b"x", worker=1).result(10)) == [b"x"]


def test_answers_that_are_there_count_though_their_worker_is_lost(start_worker, connect):
    reasons = {}
    transport = connect(start_worker().address, lost=reasons.get)
    pendings = [ask(transport, str(number).encode()) for number in range(5)]
    time.sleep(0.5)
    reasons[0] = "gone meanwhile"
    for number in (3, 0, 4, 1, 2):
        assert payload_of(pendings[number].result(10)) == [str(number).encode()]


def test_answers_that_are_there_need_no_time(start_worker, connect):
    transport = connect(start_worker().address)
    pendings = [ask(transport, str(number).encode()) for number in range(5)]
    time.sleep(0.5)
    assert payload_of(pendings[4].result(0)) == [b"4"]


def test_a_loss_ends_a_wait_at_once(start_worker, connect):
    reasons = {}
    transport = connect(start_worker("sleep").address, lost=reasons.get)
    pending = ask(transport, b"5")
    threading.Timer(0.3, reasons.update, args=({0: "now"},)).start()
    started_s = time.monotonic()
    with pytest.raises(WorkerLost, match="now"):
        pending.result(10)
    assert 0.2 < time.monotonic() - started_s < 0.5


def test_the_sockets_of_threads_that_ended_are_closed(start_worker, connect):
    transport = connect(start_worker().address)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        thread = threading.Thread(target=lambda: ask(transport, b"x").result(10))
        thread.start()
        thread.join()
    gc.collect()
    time.sleep(0.2)
    assert len(os.listdir("/proc/self/fd")) < before + 12


class TestKeys:
    """What happens when two sides do not know each other: nothing reaches the handler."""

    @pytest.fixture
    def masters(self, keys_dir, tmp_path):
        new_keys(tmp_path / "others")
        ours, others = Keys.load(keys_dir, "master"), Keys.load(tmp_path / "others", "master")
        stranger = Keys(role="master", public=others.public, secret=others.secret, peer=ours.peer)
        return {"ours": ours, "others": others, "stranger": stranger, "none": None}

    @pytest.mark.parametrize(
        ("who", "why", "log"),
        [
            ("others", "other keys", "has other keys"),
            ("stranger", "refuses this master's key", "whose key is not the master's"),
            ("none", "other keys", "has other keys"),
        ],
    )
    def test_masters_with_other_keys_are_refused(
        self, start_worker, connect, keys_dir, masters, who, why, log
    ):
        worker = start_worker("count", keys_dir=keys_dir)
        refused = connect(worker.address, keys=masters[who])
        request = next(_requests)
        started_s = time.monotonic()
        with pytest.raises(TimeoutError, match=rf"worker 0 \(tcp://.*\) gave .*: .*{why}"):
            refused.ask(0, request, [header(request), b"x"]).result(1.0)
        assert time.monotonic() - started_s < 1.15
        ours = connect(worker.address, keys=masters["ours"])
        # The very same frames: they have not been seen before.
        answer = ours.ask(0, request, [header(request), b"x"]).result(10)
        assert payload_of(answer) == [b"1"]
        time.sleep(0.5)
        lines = [line for line in worker.log if log in line]
        assert 1 <= len(lines) <= 2  # at once, and not for each of its attempts

    def test_a_worker_without_keys_is_not_asked_by_a_master_with_keys(
        self, start_worker, connect, masters
    ):
        worker = start_worker("count")
        with pytest.raises(TimeoutError, match="other keys"):
            ask(connect(worker.address, keys=masters["ours"]), b"x").result(1.0)

    def test_a_man_in_the_middle_sees_only_noise(
        self, start_worker, connect, proxy, keys_dir, masters, monkeypatch
    ):
        seen = bytearray()
        real_recv = socket.socket.recv

        def recv(self, *args):
            data = real_recv(self, *args)
            seen.extend(data)
            return data

        monkeypatch.setattr(socket.socket, "recv", recv)
        between = proxy(start_worker(keys_dir=keys_dir).address)
        secret = b"attack at dawn " * 100
        transport = connect(between.address, keys=masters["ours"])
        assert payload_of(ask(transport, secret).result(10)) == [secret]
        assert len(seen) > 2 * len(secret)
        assert b"attack at dawn" not in seen
        assert b"MoEL" not in seen


@pytest.mark.parametrize(
    ("greeting", "why"),
    [
        (None, "says nothing"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "connection broke|says nothing"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "connection broke|says nothing"),
    ],
)
def test_what_is_no_worker_is_told_apart(connect, greeting, why):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = []

        def accept():
            while True:
                try:
                    connections.append(listener.accept()[0])
                    if greeting:
                        connections[-1].sendall(greeting)
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        transport = connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        started_s = time.monotonic()
        with pytest.raises(TimeoutError, match=why):
            ask(transport, b"x").result(1.0)
        assert time.monotonic() - started_s < 1.15
        for connection in connections:
            connection.close()
        listener.shutdown(socket.SHUT_RDWR)
