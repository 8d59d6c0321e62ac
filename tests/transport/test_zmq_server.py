"""The worker's end of zmq: what it serves, what it drops, and what it says of it."""

import logging
import os
import signal
import socket
import struct
import threading
import time
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest
import zmq
from echo_worker import MAX_FRAME_BYTES, header

from moe_lightning.errors import UsageError
from moe_lightning.transport.drop_log import DropLog
from moe_lightning.transport.keys import Keys
from moe_lightning.transport.zmq_server import ZmqServer

_requests = count(1)


@pytest.fixture
def zmtp(monkeypatch):
    """Raw ZMTP."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    import bad_peers

    return bad_peers


@pytest.fixture
def serve():
    """Serve with a handler in a thread; returns the server."""
    with ExitStack() as stack:

        def start(handle, address="tcp://127.0.0.1:0", on_idle=lambda: True, **options):
            server = ZmqServer(address, **options)
            is_over = threading.Event()
            server.thread = threading.Thread(
                target=server.serve, args=(handle, lambda: on_idle() and not is_over.is_set())
            )
            server.thread.start()
            stack.callback(server.close)
            stack.callback(server.thread.join)
            stack.callback(is_over.set)
            return server

        yield start


@pytest.fixture
def dealer():
    """Connect a plain DEALER."""
    with zmq.Context() as context, ExitStack() as stack:

        def connect(address):
            peer = stack.enter_context(context.socket(zmq.DEALER))
            peer.linger = 0
            peer.rcvtimeo = 5000
            peer.connect(address)
            return peer

        yield connect


def ask(transport, *payload):
    request = next(_requests)
    return transport.ask(0, request, [header(request), *payload])


def is_answered(transport):
    payload = os.urandom(1000)
    return [bytes(frame) for frame in ask(transport, payload).result(10)[1:]] == [payload]


def raw(worker, *pieces):
    """Connect a plain TCP peer that sends pieces, each in its own packet."""
    host, port = worker.address.removeprefix("tcp://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=5)
    for piece in pieces:
        connection.sendall(piece)
        time.sleep(0.1)
    return connection


def test_a_taken_port_is_refused(start_worker, keys_dir):
    worker = start_worker()
    port = worker.address.rsplit(":", 1)[1]
    num_threads = threading.active_count()
    for keys in (None, Keys.load(keys_dir, "worker")):
        with pytest.raises(UsageError, match=rf"tcp://127.0.0.1:{port}: another program listens"):
            ZmqServer(worker.address, keys=keys)
    assert threading.active_count() == num_threads


@pytest.mark.parametrize(
    "address",
    ["tcp://192.0.2.1:4711", "ipc:///no/such/directory/x", "ipc:///tmp/" + "x" * 200],
)
def test_an_address_of_another_machine_is_refused(address):
    with pytest.raises(UsageError, match="cannot be listened on"):
        ZmqServer(address)


def test_a_host_that_nobody_knows_is_refused():
    with pytest.raises(UsageError, match="not known"):
        ZmqServer("tcp://no-such-host.invalid:4711")


def test_ipv6_and_names_can_be_listened_on(serve, connect):
    for address in ("tcp://[::1]:0", "tcp://localhost:0"):
        server = serve(lambda frames: frames, address)
        assert not server.address.endswith(":0")
        assert is_answered(connect(server.address))


def test_idle_connections_are_in_nobodys_way(start_worker, connect, zmtp):
    worker = start_worker()
    greeted = [zmtp.greeting(), zmtp.greeting()[:11], zmtp.greeting() + zmtp.ready()]
    idle = [raw(worker) for _ in range(100)]
    for number, connection in enumerate(idle):
        connection.sendall([b"", b"\xff", *greeted][number % 5])
    transport = connect(worker.address)
    started_s = time.monotonic()
    for _ in range(20):
        assert is_answered(transport)
    assert time.monotonic() - started_s < 1.0
    for connection in idle:
        connection.close()


def test_a_connection_that_never_shakes_hands_is_closed(start_worker, zmtp):
    with raw(start_worker(), zmtp.greeting()) as connection:
        connection.settimeout(8)
        started_s = time.monotonic()
        while connection.recv(4096):
            pass
        assert 4 < time.monotonic() - started_s < 7


def test_a_frame_that_is_too_long_is_never_taken_in(start_worker, connect, dealer):
    worker = start_worker()
    transport = connect(worker.address)
    assert is_answered(transport)
    before = worker.rss_bytes()
    peer = dealer(worker.address)
    peer.send_multipart([header(1), bytes(MAX_FRAME_BYTES + 1)], copy=False)
    peer.rcvtimeo = 500
    with pytest.raises(zmq.Again):
        peer.recv_multipart()
    assert worker.rss_bytes() - before < 10_000_000
    assert is_answered(transport)


@pytest.mark.parametrize("length", [MAX_FRAME_BYTES + 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1])
def test_a_claim_of_length_is_not_believed(start_worker, connect, zmtp, length):
    worker = start_worker()
    before = worker.rss_bytes()
    claim = zmtp.frame(b"x" * 1000, length=length)
    with raw(worker, zmtp.greeting(), zmtp.ready(), claim) as connection:
        assert connection.recv(4096)
        assert connection.recv(4096) == b""  # it hangs up
    assert worker.rss_bytes() - before < 10_000_000
    assert is_answered(connect(worker.address))


def test_a_message_of_too_many_frames_is_dropped(serve, connect, dealer, caplog):
    handled = []
    server = serve(lambda frames: handled.append(len(frames)) or frames)
    peer = dealer(server.address)
    for number in (1, 5, 6, 1000, 1001, 5):
        peer.send_multipart([b"x"] * number)
    assert [len(peer.recv_multipart()) for _ in range(3)] == [1, 5, 5]
    assert handled == [1, 5, 5]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["Dropped a message with a wrong number of frames: 6"]


def test_a_message_without_end_is_forgotten_with_its_connection(start_worker, connect, zmtp):
    worker = start_worker()
    transport = connect(worker.address)
    assert is_answered(transport)
    before = worker.rss_bytes()
    part = zmtp.frame(bytes(2**20), flags=zmtp.MORE)
    for _ in range(4):
        with raw(worker, zmtp.greeting(), zmtp.ready()) as connection:
            for _ in range(50):
                connection.sendall(part)
            assert is_answered(transport)
        time.sleep(0.3)
    assert worker.rss_bytes() - before < 100_000_000  # of 4 × 50 MiB


def test_peers_that_do_not_read_are_not_waited_for(start_worker, connect, zmtp):
    worker = start_worker()
    transport = connect(worker.address)
    assert is_answered(transport)
    before = worker.rss_bytes()
    for _ in range(3):
        with raw(worker, zmtp.greeting(), zmtp.ready()) as connection:
            for request in range(100):
                connection.sendall(zmtp.message([header(request), bytes(2**20)]))
            for _ in range(20):
                assert is_answered(transport)
        time.sleep(0.3)
    assert worker.rss_bytes() - before < 150_000_000  # of 3 × 100 MiB


def test_answers_that_are_read_late_are_all_there(start_worker, dealer):
    peer = dealer(start_worker().address)
    for request in range(3000):
        peer.send_multipart([header(request), bytes(10_000)])
    time.sleep(1.0)
    assert [peer.recv_multipart()[0] for _ in range(3000)] == [header(n) for n in range(3000)]


def test_a_peer_that_dies_under_load_with_a_heartbeat_under_way_ends_nobody(
    start_worker, connect, zmtp
):
    # In libzmq 4.3.5 it ends the whole process if the messages are more than its limit.
    worker = start_worker("sleep")
    peer = raw(worker, zmtp.greeting(), zmtp.ready())
    waiting = [zmtp.message([header(request), b"0"]) for request in range(100)]
    ping = zmtp.command(b"PING", b"\0\0")
    peer.sendall(b"".join([zmtp.message([header(1), b"0.5"]), *waiting, ping]))
    time.sleep(0.2)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    time.sleep(0.7)
    assert worker.process.poll() is None
    ask(connect(worker.address), b"0").result(10)


def test_an_answer_to_nobody_is_dropped(serve, dealer):
    server = serve(lambda frames: time.sleep(0.3) or frames)
    gone = dealer(server.address)
    gone.send(b"x")
    time.sleep(0.1)
    gone.close()
    stays = dealer(server.address)
    stays.send(b"y")
    assert stays.recv() == b"y"


def test_an_answer_that_is_too_long_is_dropped(serve, dealer, caplog):
    server = serve(lambda frames: [bytes(len(frames) * 1000)], max_frame_bytes=1999)
    peer = dealer(server.address)
    peer.send_multipart([b"x", b"x"])
    peer.send(b"x")
    assert peer.recv() == bytes(1000)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == "Dropped an answer that is too long: a frame of 2,000 bytes"


def test_failures_of_the_handler_are_logged_but_not_each(serve, dealer, caplog):
    def fail(frames):
        if bytes(frames[0]) == b"last":
            return frames
        raise ValueError("a long text\n" * 1000)

    peer = dealer(serve(fail).address)
    for _ in range(1000):
        peer.send(b"x")
    peer.send(b"last")
    assert peer.recv() == b"last"
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("Dropped a request that could not be handled: ValueError(")
    assert len(line) < 300
    assert "\n" not in line


def test_what_is_idle_is_told_so_also_under_load(serve, dealer):
    times = []
    server = serve(lambda frames: time.sleep(0.01) or frames, on_idle=lambda: times.append(1) or 1)
    time.sleep(1.0)
    num_alone = len(times)
    assert 4 <= num_alone <= 7
    peer = dealer(server.address)
    for _ in range(100):
        peer.send(b"x")
    for _ in range(100):
        peer.recv()
    assert 4 <= len(times) - num_alone <= 8


def test_it_leaves_when_told_to_and_the_last_answer_arrives(dealer):
    is_asked = threading.Event()

    def answer(frames):
        is_asked.set()
        return [bytes(frames[0]), bytes(2**24)]

    server = ZmqServer("tcp://127.0.0.1:0")
    peer = dealer(server.address)
    peer.send(b"x")
    answers = []
    reader = threading.Thread(target=lambda: answers.append(peer.recv_multipart()))
    reader.start()
    server.serve(answer, lambda: not is_asked.is_set())
    server.close()
    reader.join()
    assert answers == [[b"x", bytes(2**24)]]


def test_closing_can_be_repeated_and_frees_the_port():
    server = ZmqServer("tcp://127.0.0.1:0")
    server.close()
    server.close()
    ZmqServer(server.address).close()


def test_a_signal_ends_a_wait(start_worker):
    worker = start_worker()
    worker.signal(signal.SIGINT)
    assert worker.process.wait(2) != 0


def test_ends_of_connections_are_told(serve, dealer, caplog):
    caplog.set_level(logging.INFO, "moe_lightning.worker")
    peer = dealer(serve(lambda frames: frames).address)
    peer.send(b"x")
    peer.recv()
    assert caplog.records == []
    peer.close()
    time.sleep(0.6)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_log_is_not_flooded(caplog):
    log = DropLog(logging.getLogger("a test"), interval_s=0.3)
    for number in range(100):
        log("One kind", str(number))
        log("Another kind")
    time.sleep(0.35)
    log("One kind", "again")
    assert [record.getMessage() for record in caplog.records] == [
        "One kind: 0",
        "Another kind",
        "One kind: again (and 99 more before)",
    ]
