"""What only tensorpipe has: sessions, the sockets they open, and what torch does when one breaks.

What it shares with zmq is in test_transport_contract.py.
"""

import os
import signal
import socket
import time
import warnings
from contextlib import ExitStack

import psutil
import pytest
import torch
from tensorpipe_workers import TensorPipeProcess, listening

from moe_lightning.errors import UsageError, WorkersLostError
from moe_lightning.transport import tensorpipe_agent
from moe_lightning.transport.tensorpipe import TensorPipeTransport
from moe_lightning.transport.tensorpipe_joining import TensorPipeJoin
from moe_lightning.transport.tensorpipe_server import pack, unpack
from moe_lightning.transport.transport import WorkerLost

BODY = {"store_host": "127.0.0.1", "store_port": 29500, "rank": 1, "world_size": 3}


def private_hosts():
    """First addresses of this machine's interfaces that are neither loopback nor public."""
    hosts = []
    for entries in psutil.net_if_addrs().values():
        first = [each.address for each in entries if each.family == socket.AF_INET][:1]
        for address in first:
            try:
                tensorpipe_agent.address_of(address)
            except UsageError:
                continue
            if not address.startswith("127."):
                hosts.append(address)
    return hosts


@pytest.fixture(scope="module")
def processes():
    """Two processes that live through all sessions."""
    with ExitStack() as stack:
        both = [TensorPipeProcess() for _ in range(2)]
        for each in both:
            stack.callback(each.end)
        yield both


@pytest.fixture
def new_process():
    """Start a process that may be killed."""
    with ExitStack() as stack:

        def start():
            process = TensorPipeProcess()
            stack.callback(process.end)
            return process

        yield start


@pytest.fixture
def open_session():
    """Open a session of this process with workers; returns transport and what is lost."""
    with ExitStack() as stack:

        def start(*workers, join=lambda worker, body: worker.join(body), timeout_s=30.0):
            lost = {}
            transport = TensorPipeTransport.open(
                "127.0.0.1",
                [f"the {number}th" for number in range(len(workers))],
                join=lambda number, body: join(workers[number], body),
                lost=lost.get,
                give_up=lost.__setitem__,
                timeout_s=timeout_s,
            )
            stack.callback(transport.close)
            return transport, lost

        yield start


def echo(transport, worker, *payload):
    return [bytes(frame) for frame in transport.ask(worker, 1, payload).result(20)]


# ── frames ──


def test_large_frames_share_their_memory():
    rows = torch.arange(5000, dtype=torch.float32)
    (part,) = pack([rows.numpy()])
    assert part.data_ptr() == rows.data_ptr()
    (frame,) = unpack([part])
    frame.cast("f")[7] = -1.0
    assert rows[7] == -1.0


def test_frames_are_writable_bytes_whatever_they_were():
    frames = [b"", b"small", bytes(10_000), bytearray(b"x" * 5000), torch.ones(3).numpy()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, about memory that is read-only
        received = unpack(pack(frames))
    assert [bytes(frame) for frame in received] == [bytes(memoryview(each)) for each in frames]
    assert all(frame.format == "B" and not frame.readonly for frame in received)


# ── what a worker is told ──


def test_a_join_is_read_as_it_was_written():
    assert TensorPipeJoin.parse(BODY).body() == BODY


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"store_host": 2130706433}, "store_host = '2130706433' is no str"),
        ({"store_host": "localhost"}, "'localhost' is no IPv4 address"),
        ({"store_host": "::1"}, "'::1' is no IPv4 address"),
        ({"store_host": "1" * 10**6}, "'1{99} is no IPv4 address"),
        ({"store_host": "8.8.8.8"}, "no private address"),
        ({"store_host": "0.0.0.0"}, "no private address"),
        ({"store_port": "29500"}, "store_port = '29500' is no int"),
        ({"store_port": 0}, "no port"),
        ({"store_port": 65536}, "no port"),
        ({"rank": 0}, "rank = 0 of 3"),
        ({"rank": 3}, "rank = 3 of 3"),
        ({"rank": True}, "rank = 'True' is no int"),
        ({"rank": 1.0}, "rank = '1.0' is no int"),
        ({"world_size": 10**9}, "of 1000000000"),
        ({"more": 1}, "more"),
    ],
)
def test_a_malformed_join_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        TensorPipeJoin.parse(BODY | change)


def test_an_incomplete_join_is_refused():
    with pytest.raises(ValueError, match="expected"):
        TensorPipeJoin.parse({key: BODY[key] for key in BODY if key != "rank"})


def test_a_worker_on_loopback_joins_no_master_elsewhere(processes):
    with pytest.raises(RuntimeError, match=r"ValueError.*192\.168\.7\.7.*this machine only"):
        processes[0].join(BODY | {"store_host": "192.168.7.7"})


def test_a_worker_whose_master_is_gone_does_not_wait(processes):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started_s = time.monotonic()
    with pytest.raises(RuntimeError, match=f"store at 127.0.0.1:{port} cannot be reached"):
        processes[0].join(BODY | {"store_port": port})
    assert time.monotonic() - started_s < 15  # most of it imports torch


# ── where it listens ──


@pytest.mark.parametrize(
    ("host", "complaint"),
    [
        ("8.8.8.8", "public address"),
        ("::1", "IPv4"),
        ("0.0.0.0", "first IPv4 address of a network interface"),
        ("10.254.253.252", "first IPv4 address of a network interface"),
        ("127.0.0.2", "first IPv4 address of a network interface"),
    ],
)
def test_a_host_that_cannot_be_listened_on_is_refused(host, complaint):
    def join(worker, body):
        raise AssertionError("nobody is to be asked")

    with pytest.raises(UsageError, match=complaint):
        TensorPipeTransport.open(
            host,
            ["one"],
            join=join,
            lost=lambda _: None,
            give_up=lambda *_: None,
            timeout_s=5,
        )
    assert listening(os.getpid()) == []


@pytest.mark.parametrize("host", ["127.0.0.1", *private_hosts()])
def test_nothing_listens_elsewhere(new_process, host):
    master, worker = new_process(), new_process()
    master.order("open", host=host)
    body = master.reply()
    assert master.listening() == [host]  # the store
    worker.join(body, host=host)
    master.order("joined")
    master.reply()
    assert master.listening() == worker.listening() == [host]
    master.tell("close")
    worker.tell("close")
    assert master.listening() == worker.listening() == []


@pytest.mark.parametrize("other", private_hosts()[:1])
def test_an_address_that_torch_does_not_take_is_noticed(new_process, processes, other):
    # torch looks its address up once in the life of a process.
    master, worker = new_process(), processes[0]
    master.open(worker)
    master.tell("close")
    worker.tell("close")
    master.order("open", host=other)
    body = master.reply() | {"store_host": other}
    new_process().order("join", body=body, host=other)
    with pytest.raises(RuntimeError, match=rf"listens on \['127.0.0.1'\] instead of {other}"):
        master.reply()
    assert master.listening() == []


# ── sessions ──


def test_sessions_follow_each_other_with_other_ranks(processes, open_session):
    for order in (processes, processes[::-1], processes[:1], processes):
        transport, lost = open_session(*order)
        assert listening(os.getpid()) == ["127.0.0.1"]
        for number in range(len(order)):
            assert echo(transport, number, b"to", bytes([number])) == [b"to", bytes([number])]
        transport.close()
        for each in order:
            each.tell("close")
        assert not lost
        assert listening(os.getpid()) == []


def test_a_process_is_in_one_session_at_a_time(processes, open_session):
    transport, _ = open_session(processes[0])
    with pytest.raises(RuntimeError, match="already, and can be in one at a time"):
        open_session(processes[1])
    with pytest.raises(RuntimeError, match="already, and can be in one at a time"):
        processes[0].join(BODY)
    assert echo(transport, 0, b"still") == [b"still"]
    transport.close()
    processes[0].tell("close")


def test_rows_of_inference_go_and_come_without_a_change(processes, open_session):
    transport, _ = open_session(processes[0])
    with torch.inference_mode():
        rows = torch.randn(16, 2**20)  # 64 MiB
        (frame,) = transport.ask(0, 1, [rows.view(torch.uint8).numpy()]).result(20)
        torch.testing.assert_close(
            torch.frombuffer(frame, dtype=torch.float32).view_as(rows), rows, rtol=0, atol=0
        )
    transport.close()
    processes[0].tell("close")


def test_a_missing_worker_is_named_in_time_and_the_others_are_free(processes, open_session):
    def join(worker, body):
        if worker is not None:
            worker.join(body)

    started_s = time.monotonic()
    with pytest.raises(WorkersLostError, match=r"worker 1 \(the 1th\): nothing came from it in 3"):
        open_session(processes[0], None, join=join, timeout_s=3.0)
    assert 2.9 < time.monotonic() - started_s < 4.0
    transport, _ = open_session(*processes, timeout_s=20.0)  # waits for its failed join too
    assert time.monotonic() - started_s < 10.0
    assert echo(transport, 1, b"here") == [b"here"]
    transport.close()
    for each in processes:
        each.tell("close")


def test_a_refusal_is_passed_on_at_once(processes, open_session):
    def join(worker, body):
        raise ConnectionError("no memory left")

    started_s = time.monotonic()
    with pytest.raises(WorkersLostError, match=r"worker 0 \(the 0th\): no memory left") as caught:
        open_session(None, join=join)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert time.monotonic() - started_s < 1.0


def test_a_worker_that_arrives_and_dies_is_named_in_time(open_session):
    def join(worker, body):
        store = torch.distributed.TCPStore(
            body["store_host"], body["store_port"], is_master=False, wait_for_workers=False
        )
        store.set(f"moe_lightning/arrived/{body['rank']}", "")

    started_s = time.monotonic()
    with pytest.raises(WorkersLostError, match=r"worker 0 \(the 0th\)"):
        open_session(None, join=join, timeout_s=2.0)
    assert time.monotonic() - started_s < 4.0


# ── what breaks ──


def test_a_killed_worker_is_given_up_at_once(new_process, processes, open_session):
    worker = new_process()
    transport, lost = open_session(worker, processes[0])
    pending = transport.ask(0, 1, [b"sleep", b"30"])
    time.sleep(0.2)
    worker.signal(signal.SIGKILL)
    killed_s = time.monotonic()
    with pytest.raises(WorkerLost, match="worker 0: its connection broke"):
        pending.result(20)
    assert time.monotonic() - killed_s < 0.5  # nobody but torch has told
    assert list(lost) == [0]
    with pytest.raises(WorkerLost, match="worker 0: its connection broke"):
        transport.ask(0, 1, [b"x"])
    lost.clear()  # and without what was learned
    with pytest.raises(WorkerLost, match="worker 0: its connection broke"):
        transport.ask(0, 1, [b"x"]).result(5)
    assert echo(transport, 1, b"the other") == [b"the other"]
    started_s = time.monotonic()
    transport.close()
    processes[0].tell("close")
    assert time.monotonic() - started_s < 1.0


def test_a_stopped_worker_keeps_nobody_waiting(new_process, open_session):
    worker = new_process()
    transport, lost = open_session(worker)
    worker.signal(signal.SIGSTOP)
    pending, *_ = [transport.ask(0, 1, [bytearray(2**25)]) for _ in range(3)]
    started_s = time.monotonic()
    with pytest.raises(TimeoutError, match=r"worker 0 \(the 0th\): no answer in 0.5 s"):
        pending.result(0.5)
    assert not lost
    lost[0] = "no sign of life"
    with pytest.raises(WorkerLost, match="worker 0: no sign of life"):
        pending.result(20)
    transport.close()  # with 96 MiB that can't be sent
    assert time.monotonic() - started_s < 1.5


def test_a_worker_outlives_its_master(new_process, processes, open_session):
    master, worker = new_process(), processes[0]
    master.open(worker)
    master.tell("ask", text="sleep 0.5", num_bytes=2**25)
    master.tell("ask", text="sleep 30", num_bytes=2**25)
    time.sleep(0.2)
    master.signal(signal.SIGKILL)
    started_s = time.monotonic()
    worker.tell("close")  # the request in computation, but not the next
    assert time.monotonic() - started_s < 2.0
    transport, _ = open_session(worker)
    assert echo(transport, 0, b"again") == [b"again"]
    transport.close()
    worker.tell("close")


def test_processes_end_normally_in_the_middle_of_a_session(new_process):
    # Left to themselves they would abort: "terminate called without an active exception".
    master, worker = new_process(), new_process()
    master.open(worker)
    worker.signal(signal.SIGSTOP)
    master.tell("ask", text="sleep 0.1", num_bytes=2**25)
    master.process.stdin.close()
    assert master.process.wait(10) == 0
    worker.signal(signal.SIGCONT)
    worker.process.stdin.close()
    assert worker.process.wait(10) == 0
