"""Teams: echo workers as processes, and the master's transport to them."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from echo_worker import SESSION

from moe_lightning.transport.keys import Keys, new_keys
from moe_lightning.transport.liveness import Liveness
from moe_lightning.transport.zmq_transport import ZmqTransport


class EchoWorker:
    """A process of `echo_worker.py`, from its parent's side."""

    def __init__(self, transport, handler, address, keys_dir=None):
        script = Path(__file__).with_name("echo_worker.py")
        arguments = [transport, handler, address] + ([] if keys_dir is None else [str(keys_dir)])
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.log = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        line = self.process.stdout.readline()
        if not line:
            self.end()
            raise RuntimeError("".join(self.log))
        addresses = json.loads(line)
        self.address, self.pulse = addresses["address"], addresses["pulse"]

    def _read_log(self):
        # All the time: a full pipe would stop the worker.
        self.log.extend(iter(self.process.stderr.readline, ""))

    def join(self, body):
        self.process.stdin.write(json.dumps(body) + "\n")
        self.process.stdin.flush()
        if not self.process.stdout.readline():
            raise RuntimeError("".join(self.log))

    def signal(self, number):
        self.process.send_signal(number)

    def rss_bytes(self):
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def end(self):
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with suppress(OSError):
                pipe.close()


class Team:
    """A transport, its workers and the watch over them."""

    def __init__(self, transport, workers, liveness):
        self.transport = transport
        self.workers = workers
        self.liveness = liveness


def _zmq_team(stack, *, name, num_workers, handler, timeout_s, tmp_path, keys_dir):
    keys_dir = keys_dir if name == "zmq-curve" else None
    keys = None if keys_dir is None else Keys.load(keys_dir, "master")
    workers = []
    for number in range(num_workers):
        address = "tcp://127.0.0.1:0" if name != "zmq-ipc" else f"ipc://{tmp_path}/{number}"
        workers.append(EchoWorker("zmq", handler, address, keys_dir))
        stack.callback(workers[-1].end)
    liveness = _watch(stack, workers, timeout_s, keys)
    addresses = [worker.address for worker in workers]
    return Team(ZmqTransport(addresses, keys=keys, lost=liveness.lost), workers, liveness)


def _tensorpipe_team(stack, *, num_workers, handler, timeout_s, **_):
    from moe_lightning.transport.tensorpipe import TensorPipeTransport

    workers = []
    for _number in range(num_workers):
        workers.append(EchoWorker("tensorpipe", handler, "tcp://127.0.0.1:0"))
        stack.callback(workers[-1].end)
    liveness = _watch(stack, workers, timeout_s, None)
    transport = TensorPipeTransport.open(
        "127.0.0.1",
        [f"worker {number}" for number in range(num_workers)],
        join=lambda worker, body: workers[worker].join(body),
        lost=liveness.lost,
        give_up=liveness.give_up,
        timeout_s=30,
    )
    return Team(transport, workers, liveness)


def _watch(stack, workers, timeout_s, keys):
    liveness = Liveness(session=SESSION, timeout_s=timeout_s, keys=keys)
    stack.callback(liveness.close)
    for number, worker in enumerate(workers):
        liveness.watch(number, f"worker {number}", worker.pulse)
    return liveness


_TEAMS = {
    "zmq-ipc": _zmq_team,
    "zmq-tcp": _zmq_team,
    "zmq-curve": _zmq_team,
    "tensorpipe": _tensorpipe_team,
}


@pytest.fixture(scope="session")
def keys_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keys") / "ours"
    new_keys(directory)
    return directory


@pytest.fixture(params=list(_TEAMS))
def start_team(request, tmp_path, keys_dir):
    """Start workers with a handler of `echo_worker`, by its name; returns their team."""
    with ExitStack() as stack:

        def start(handler="echo", num_workers=1, timeout_s=15.0):
            team = _TEAMS[request.param](
                stack,
                name=request.param,
                num_workers=num_workers,
                handler=handler,
                timeout_s=timeout_s,
                tmp_path=tmp_path,
                keys_dir=keys_dir,
            )
            stack.callback(team.transport.close)
            return team

        yield start


@pytest.fixture
def start_worker():
    """Start one zmq worker: handler, address, directory of keys."""
    with ExitStack() as stack:

        def start(handler="echo", address="tcp://127.0.0.1:0", keys_dir=None):
            worker = EchoWorker("zmq", handler, address, keys_dir)
            stack.callback(worker.end)
            return worker

        yield start


@pytest.fixture
def connect():
    """Make a master's transport to addresses."""
    with ExitStack() as stack:

        def connect_to(*addresses, **options):
            transport = ZmqTransport(addresses, **options)
            stack.callback(transport.close)
            return transport

        yield connect_to
