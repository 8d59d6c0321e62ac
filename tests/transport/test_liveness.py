import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest
import zmq
from echo_worker import SESSION
from proxies import TcpProxy

from moe_lightning.errors import UsageError
from moe_lightning.transport.addresses import split
from moe_lightning.transport.clock import AwakeClock
from moe_lightning.transport.keys import Keys, new_keys
from moe_lightning.transport.liveness import Liveness
from moe_lightning.transport.pulse import PulseServer, parse_pong, ping


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def pulse(stack):
    """Start a pulse of a session."""

    def start(address="tcp://127.0.0.1:0", session=SESSION, **options):
        server = PulseServer(address, **options)
        server.session = session
        stack.callback(server.close)
        return server

    return start


@pytest.fixture
def watch(stack):
    """Watch one worker, with a pulse at an address."""

    def start(address, timeout_s=2.0, keys=None, session=SESSION):
        liveness = Liveness(session=session, timeout_s=timeout_s, keys=keys)
        stack.callback(liveness.close)
        liveness.watch(0, "worker 0", address)
        return liveness

    return start


@pytest.fixture
def proxy(stack):
    """Put a proxy before an address."""

    def start(address, cuts=()):
        proxy = TcpProxy(split(address), cuts)
        stack.callback(proxy.close)
        return proxy

    return start


def wait_for(condition, within_s):
    """Seconds until a condition holds; None if it never does."""
    started_s = time.monotonic()
    while time.monotonic() - started_s < within_s:
        if condition():
            return time.monotonic() - started_s
        time.sleep(0.01)
    return None


def test_a_pulse_says_what_the_worker_does(pulse, watch):
    server = pulse(progress=lambda: 12345)
    liveness = watch(server.address)
    assert wait_for(lambda: liveness.progress(0).bytes_read == 12345, 1.0)
    assert liveness.progress(0).busy_ms == 0
    for _ in range(3):
        with server.busy():
            pass
    with server.busy():
        assert wait_for(lambda: liveness.progress(0).busy_ms > 300, 2.0)
        assert liveness.progress(0).busy_ms < 2000
        assert liveness.progress(0).num_done == 3
    assert wait_for(lambda: liveness.progress(0).num_done == 4, 1.0)
    assert liveness.progress(0).busy_ms == 0
    assert liveness.lost(0) is None


def test_before_the_first_pong_there_is_no_progress(watch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        liveness = watch(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        assert liveness.progress(0).bytes_read == 0
        assert liveness.lost(0) is None


def test_nobody_there_is_lost_in_time(watch):
    liveness = watch("tcp://127.0.0.1:9", timeout_s=1.0)
    assert 0.9 < wait_for(lambda: liveness.lost(0), 2.0) < 1.3
    assert liveness.lost(0) == "no sign of life for 1 s"


def test_a_closed_pulse_is_lost_at_once(pulse, watch):
    server = pulse()
    liveness = watch(server.address)
    assert wait_for(lambda: liveness.progress(0).number > 0, 1.0)
    server.close()
    assert 0.5 < wait_for(lambda: liveness.lost(0), 2.0) < 1.0
    assert liveness.lost(0) == "its connection closed"


def test_a_worker_that_dies_right_after_a_pong_is_lost_at_once(watch):
    for _ in range(5):
        with zmq.Context() as context:
            router = context.socket(zmq.ROUTER)
            router.bind("tcp://127.0.0.1:0")
            liveness = watch(router.last_endpoint.decode(), timeout_s=10.0)
            for _ in range(3):
                peer, raw = router.recv_multipart()
                number = int.from_bytes(raw[12:], "little")
                pong = struct.pack("<4sQQQQI", b"MoEP", number, SESSION, 1, 1, 1)
                router.send_multipart([peer, pong])
            router.close()
        # Its last pong and its end are noticed together.
        assert wait_for(lambda: liveness.lost(0), 3.0) < 1.0  # noqa: B023
        liveness.close()


@pytest.mark.parametrize("session", [0, SESSION + 1])
def test_a_worker_of_another_session_is_lost_at_once(pulse, watch, session):
    server = pulse()
    liveness = watch(server.address)
    assert wait_for(lambda: liveness.progress(0).number > 0, 1.0)
    server.session = session
    assert wait_for(lambda: liveness.lost(0), 2.0) < 0.5
    assert "this session no more" in liveness.lost(0)


def test_a_restarted_worker_is_lost_at_once(pulse, watch):
    server = pulse()
    liveness = watch(server.address)
    assert wait_for(lambda: liveness.progress(0).number > 0, 1.0)
    server.close()
    pulse(server.address, session=0)
    assert wait_for(lambda: liveness.lost(0), 2.0) < 1.0
    assert "restarted" in liveness.lost(0)


def test_a_cut_connection_is_dialled_anew(pulse, watch, proxy):
    server = pulse()
    between = proxy(server.address)
    liveness = watch(between.address, timeout_s=10.0)
    for _ in range(8):
        number = liveness.progress(0).number
        assert wait_for(lambda: liveness.progress(0).number > number, 2.0)  # noqa: B023
        between.cut_all()
    time.sleep(1.5)
    assert liveness.lost(0) is None
    assert between.num_connections == 9


def test_connections_cut_at_any_byte_do_no_harm(pulse, watch, proxy):
    server = pulse()
    for direction in ("up", "down"):
        # Of a greeting of 64 bytes, a handshake, a ping of 20 and a pong of 40 bytes. Each cut
        # costs 50 ms until the next connection, of the 600 ms that a worker may be away.
        for sizes in ([0, 1, 10, 11], [12, 63, 64, 65], [90, 91, 92, 93], [100, 110, 120, 130]):
            between = proxy(server.address, [(direction, num_bytes) for num_bytes in sizes])
            liveness = watch(between.address, timeout_s=10.0)
            assert wait_for(lambda: liveness.progress(0).number > 0, 2.0), sizes  # noqa: B023
            time.sleep(0.8)
            assert liveness.lost(0) is None, sizes


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_line_that_goes_dead_is_lost_in_time(pulse, watch, proxy, direction):
    server = pulse()
    between = proxy(server.address)
    liveness = watch(between.address, timeout_s=1.5)
    assert wait_for(lambda: liveness.progress(0).number > 2, 2.0)
    between.is_open[direction].clear()
    assert 1.1 < wait_for(lambda: liveness.lost(0), 3.0) < 1.8
    assert liveness.lost(0) == "no sign of life for 1.5 s"


def test_a_slow_line_is_alive(pulse, watch, proxy):
    between = proxy(pulse().address)
    between.delay_s = 0.4
    liveness = watch(between.address, timeout_s=3.0)
    time.sleep(4.0)
    assert liveness.lost(0) is None
    assert liveness.progress(0).number > 0


def test_the_lost_stay_lost_for_the_first_reason(pulse, watch):
    liveness = watch(pulse().address)
    assert wait_for(lambda: liveness.progress(0).number > 0, 1.0)
    liveness.give_up(0, "its answers are wrong")
    liveness.give_up(0, "another reason")
    assert liveness.lost(0) == "its answers are wrong"
    time.sleep(0.5)
    assert liveness.lost(0) == "its answers are wrong"
    number = liveness.progress(0).number
    time.sleep(0.5)
    assert liveness.progress(0).number == number
    assert liveness.lost(1) is None


def test_many_are_watched(pulse, watch):
    servers = [pulse() for _ in range(12)]
    liveness = watch(servers[0].address)
    for number, server in enumerate(servers[1:], 1):
        liveness.watch(number, f"worker {number}", server.address)
    assert wait_for(lambda: all(liveness.progress(n).number > 1 for n in range(12)), 3.0)
    servers[5].close()
    assert wait_for(lambda: liveness.lost(5), 2.0)
    assert [number for number in range(12) if liveness.lost(number)] == [5]


def test_keys_are_needed_on_both_sides(pulse, watch, tmp_path):
    new_keys(tmp_path / "ours")
    new_keys(tmp_path / "others")
    server = pulse(keys=Keys.load(tmp_path / "ours", "worker"))
    ours = watch(server.address, keys=Keys.load(tmp_path / "ours", "master"))
    others = watch(server.address, keys=Keys.load(tmp_path / "others", "master"))
    none = watch(server.address)
    assert wait_for(lambda: others.lost(0) and none.lost(0), 3.0)
    assert others.lost(0) == none.lost(0) == "it refused the keys"
    assert wait_for(lambda: ours.progress(0).number > 4, 3.0)
    assert ours.lost(0) is None


def test_closing_is_quick_and_can_be_repeated(pulse, watch):
    server = pulse()
    liveness = watch(server.address)
    liveness.watch(1, "worker 1", "tcp://127.0.0.1:9")
    started_s = time.monotonic()
    liveness.close()
    liveness.close()
    server.close()
    server.close()
    assert time.monotonic() - started_s < 0.5


def test_silence_is_counted_from_the_last_ping_of_the_session(pulse, watch):
    server = pulse()
    with zmq.Context() as context, context.socket(zmq.DEALER) as other:
        other.connect(server.address)
        for number in range(7):
            other.send(ping(SESSION + 1, number))
            assert parse_pong(other.recv()).session == 0
            time.sleep(0.1)
    assert 0.5 < server.silence_s() < 0.9
    ours = watch(server.address)
    time.sleep(1.0)
    assert server.silence_s() < 0.4
    ours.close()
    time.sleep(0.7)
    assert server.silence_s() > 0.5
    server.session = SESSION + 2
    assert server.silence_s() < 0.2


def test_a_pulse_bears_nonsense(pulse, watch):
    server = pulse()
    liveness = watch(server.address)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.rcvtimeo = 1000
        dealer.connect(server.address)
        for size in (0, 1, 19, 20, 21, 500):
            dealer.send(os.urandom(size))
            dealer.send_multipart([os.urandom(size)] * 7)
        dealer.send_multipart([ping(SESSION, 1), b"more"])
        dealer.send(ping(SESSION, 2**64 - 1))
        pong = parse_pong(dealer.recv())
        assert (pong.session, pong.number) == (SESSION, 2**64 - 1)
        with dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED) as ends:
            assert not ends.poll(100)
            dealer.send(os.urandom(5000))  # longer than what a pulse takes in
            assert ends.poll(2000)
            dealer.disable_monitor()
    time.sleep(0.5)
    assert liveness.lost(0) is None


def test_a_master_bears_nonsense(watch):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        liveness = watch(f"tcp://127.0.0.1:{port}", timeout_s=2.0)
        peer, _ = router.recv_multipart()
        for size in (0, 1, 39, 40, 41, 500):
            router.send_multipart([peer, os.urandom(size), b"more"])
        # A pong to a ping that was never sent.
        router.send_multipart([peer, struct.pack("<4sQQQQI", b"MoEP", 2**63, 9, 1, 1, 1)])
        assert 1.8 < wait_for(lambda: liveness.lost(0), 4.0) < 2.3
        assert liveness.lost(0) == "no sign of life for 2 s"
        assert liveness.progress(0).number == 0


def test_a_taken_port_is_refused(pulse):
    server = pulse()
    with pytest.raises(UsageError, match="another program listens"):
        PulseServer(server.address)


def test_a_clock_does_not_count_sleep():
    clock = AwakeClock(0.1)
    for _ in range(3):
        time.sleep(0.05)
        clock.tick()
    time.sleep(0.5)
    clock.tick()
    assert 0.24 < clock.now_s < 0.32


_MASTER = """
import sys, time
from moe_lightning.transport.liveness import Liveness
liveness = Liveness(session=int(sys.argv[1]), timeout_s=1.0)
liveness.watch(0, "worker 0", sys.argv[2])
for line in sys.stdin:
    print(liveness.lost(0), liveness.progress(0).number, flush=True)
"""


def test_a_master_that_was_suspended_blames_nobody(pulse):
    server = pulse()
    with subprocess.Popen(
        [sys.executable, "-c", _MASTER, str(SESSION), server.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as master:

        def state():
            master.stdin.write("\n")
            master.stdin.flush()
            return master.stdout.readline().split()

        assert wait_for(lambda: int(state()[1]) > 2, 10.0)
        master.send_signal(signal.SIGSTOP)
        time.sleep(3.0)
        assert server.silence_s() > 2.5
        master.send_signal(signal.SIGCONT)
        number = int(state()[1])
        time.sleep(1.5)
        lost, last = state()
        assert lost == "None"
        assert int(last) > number
        master.stdin.close()


def test_threads_may_ask_while_workers_come_and_go(pulse, watch):
    liveness = watch(pulse().address)
    is_over = threading.Event()
    errors = []

    def ask():
        while not is_over.is_set():
            try:
                liveness.lost(0)
                liveness.progress(0)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(1, 20):
        liveness.watch(number, "another", "tcp://127.0.0.1:9")
        liveness.give_up(number, "enough")
        time.sleep(0.02)
    is_over.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert liveness.lost(0) is None


def test_with_nobody_to_watch_it_sleeps(watch):
    liveness = watch("tcp://127.0.0.1:9")
    liveness.give_up(0, "enough")
    time.sleep(0.3)
    before_s = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before_s < 0.3
