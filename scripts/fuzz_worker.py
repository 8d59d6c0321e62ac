"""Throw malformed things at a live worker's sockets: genuine masters must not notice.

    python scripts/fuzz_worker.py [--throws 10000] [--seed N] [--keys true]

Noise, other protocols, greetings, handshakes and frames gone wrong, claims of enormous lengths,
messages without end, and (half of all) damaged messages of our own protocol in valid frames; some
at the pulse. With keys, only the holder of the key may get as far as the parser.

Meanwhile a genuine master asks without a pause and looks at every answer, and the worker's pulse is
watched. The exit code is 1 if an answer is wrong, late or missing, if the pulse stops, if the
worker grows by more than 200 MB or ends, if its log is flooded, or (with keys) if anything of a
stranger's reaches its handler.
"""

import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bad_peers import BadPeers, Conversation, greeting, message, ready
from damaged_messages import DamagedMessages
from fuzz_worker_target import SESSION
from jsonargparse import CLI
from tqdm import tqdm

from moe_lightning.transport.keys import Keys, new_keys
from moe_lightning.transport.liveness import Liveness
from moe_lightning.transport.messages import MAX_FRAMES, Control
from moe_lightning.transport.transport import WorkerLost
from moe_lightning.transport.zmq_transport import ZmqTransport

MAX_GROWTH_MB = 200
MAX_ANSWER_S = 10.0
MAX_LOG_BYTES = 200_000
MAX_IDLE = 100  # connections that are left open meanwhile
DAMAGED = "a damaged message"
_RESET = struct.pack("ii", 1, 0)  # close with RST


class WorkerError(Exception):
    """The worker did what it must not do."""


class Worker:
    """The process that is thrown at.

    Args:
        handler: Method of `fuzz_worker_target.Target`.
        keys_directory: Its keys; empty for none.
        log: File of its log.
    """

    def __init__(self, handler: str, keys_directory: str, log: Path) -> None:
        self._log = log
        script = Path(__file__).with_name("fuzz_worker_target.py")
        with open(log, "wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, script, handler, keys_directory],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.addresses: dict[str, str] = json.loads(self._line())
        self.start_mb = 0.0

    def memory_mb(self, name: str) -> float:
        """`VmRSS`, what it has, or `VmHWM`, the most it has had."""
        with open(f"/proc/{self.process.pid}/status") as file:
            (line,) = (line for line in file if line.startswith(name))
        return int(line.split()[1]) / 1024

    def check(self) -> None:
        """That it lives, and is no larger than it may be."""
        try:
            growth_mb = self.memory_mb("VmHWM") - self.start_mb
        except (OSError, ValueError):
            raise WorkerError(f"it ended with exit code {self.process.wait(10)}") from None
        if growth_mb > MAX_GROWTH_MB:
            raise WorkerError(f"it has grown by {growth_mb:.0f} MB, of {MAX_GROWTH_MB} MB")
        if self._log.stat().st_size > MAX_LOG_BYTES:
            raise WorkerError(f"its log has {self._log.stat().st_size:,} bytes")

    def end(self) -> dict[str, int]:
        """End it; returns what reached its handler."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        counts: dict[str, int] = json.loads(self._line())
        self.process.wait(10)
        return counts

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline() or "{}"


class Master:
    """A genuine master in a thread: asks, and compares the answers with its questions.

    Args:
        worker: The worker.
        keys: The master's keys.
    """

    def __init__(self, worker: Worker, keys: Keys | None) -> None:
        self.error: str | None = None
        self.num_answers = 0
        self.slowest_s = 0.0
        self._liveness = Liveness(session=SESSION, timeout_s=MAX_ANSWER_S, keys=keys)
        self._liveness.watch(0, "the worker", worker.addresses["pulse"])
        self._transport = ZmqTransport(
            [worker.addresses["requests"]], keys=keys, lost=self._liveness.lost
        )
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._transport.close()
        self._liveness.close()

    def _run(self) -> None:
        sizes = random.Random(0)
        while not self._is_over.is_set() and self.error is None:
            request = self.num_answers + 1
            body = {"text": "x" * sizes.choice((0, 10, 1000, 300_000))}
            frames = [bytes(each) for each in Control(SESSION, request, "hello", body).frames()]
            start_s = time.monotonic()
            try:
                answer = self._transport.ask(0, request, frames).result(MAX_ANSWER_S)
            except (TimeoutError, WorkerLost) as error:
                self.error = f"a genuine master got no answer: {error}"
                return
            if [bytes(each) for each in answer] != frames:
                self.error = f"a genuine master got a wrong answer to request {request}"
            self.slowest_s = max(self.slowest_s, time.monotonic() - start_s)
            self.num_answers += 1
            time.sleep(0.002)


class Thrower:
    """Opens connections and sends conversations; leaves some open.

    Args:
        worker: The worker.
        keys: The master's keys, with which damaged messages are sent too.
        seed: Of all choices.
    """

    def __init__(self, worker: Worker, keys: Keys | None, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.num_parsed = 0  # damaged messages that the handler must have seen
        self._rng = random.Random(seed)
        self._peers = BadPeers(self._rng)
        self._damaged = DamagedMessages(seed)
        self._addresses = {name: _host(text) for name, text in worker.addresses.items()}
        self._has_keys = keys is not None
        self._insider = ZmqTransport([worker.addresses["requests"]], keys=keys)
        self._idle: deque[socket.socket] = deque()

    def throw(self) -> None:
        """Throw one thing."""
        rng = self._rng
        if rng.random() < 0.5:
            self.counts[DAMAGED] += 1
            self._throw_damaged([bytes(frame) for frame in self._damaged.frames()])
            return
        kind = rng.choice(list(self._peers.kinds))
        self.counts[kind] += 1
        self._send(rng.choice(("requests", "requests", "pulse")), self._peers.conversation(kind))

    def end(self) -> None:
        for connection in self._idle:
            connection.close()
        self._insider.close()

    def _throw_damaged(self, frames: list[bytes]) -> None:
        if frames and (self._has_keys or self._rng.random() < 0.5):
            self._insider.ask(0, 0, frames)
            self.num_parsed += len(frames) <= MAX_FRAMES
        else:
            self._send("requests", [greeting(), ready(), message(frames)])

    def _send(self, name: str, conversation: Conversation) -> None:
        # The worker may hang up at any byte: that is its right.
        with suppress(OSError):
            connection = socket.create_connection(self._addresses[name], timeout=5.0)
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                heard = bytearray()
                for piece in conversation:
                    connection.sendall(piece)
                    _hear(connection, piece, heard)
            finally:
                self._leave(connection)

    def _leave(self, connection: socket.socket) -> None:
        # What has not been read when a connection ends is often never read: most stay a while.
        way = self._rng.choice(("close", "reset", "half", *["idle"] * 7))
        if way == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        if way == "half":
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        if way in ("close", "reset"):
            connection.close()
            return
        self._idle.append(connection)
        if len(self._idle) > MAX_IDLE:
            self._idle.popleft().close()


def _hear(connection: socket.socket, piece: bytes, heard: bytearray) -> None:
    """Wait for the other side's greeting or READY: what comes before them is refused unseen."""
    end = {greeting(): b"NULL", ready(): b"READY"}.get(piece, b"")
    connection.settimeout(0.05)
    with suppress(TimeoutError):
        while end not in heard:
            more = connection.recv(4096)
            if not more:
                raise ConnectionResetError
            heard += more
    connection.settimeout(5.0)


def fuzz(*, throws: int, seed: int, keys: bool, handler: str = "refuses") -> int:
    """Throw, and print what happened.

    Args:
        throws: How many.
        seed: Of all choices.
        keys: Whether the worker has keys.
        handler: What the worker does.

    Returns:
        The exit code.
    """
    print(f"seed {seed}, {'with' if keys else 'without'} keys", flush=True)
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, _worker(handler, keys, directory) as worker:
        master_keys = Keys.load(f"{directory}/keys", "master") if keys else None
        thrower, master = Thrower(worker, master_keys, seed), Master(worker, master_keys)
        try:
            _wait_for_answers(master, 100)  # by then the worker has its usual size
            worker.start_mb = worker.memory_mb("VmHWM")
            for number in tqdm(range(throws), unit=" throws", mininterval=1.0):
                thrower.throw()
                if number % 50 == 0:
                    _check(worker, master)
            _wait_for_answers(master, master.num_answers + 100)
            _check(worker, master)
            growth_mb = worker.memory_mb("VmHWM") - worker.start_mb
            last_mb = worker.memory_mb("VmRSS") - worker.start_mb
        except WorkerError as error:
            print(f"after {thrower.counts.total():,} throws of seed {seed}: {error}")
            print((Path(directory) / "log").read_text()[-2000:])
            return 1
        finally:
            master.end()
            thrower.end()
        counts = worker.end()
        log = (Path(directory) / "log").read_text()
    for kind, count in thrower.counts.most_common():
        print(f"{count:>8,}  {kind}")
    print(
        f"{thrower.counts.total():>8,}  thrown in {time.monotonic() - start_s:.0f} s; the handler "
        f"refused {counts.get('refused', 0):,} and read {counts.get('read', 0):,}\n"
        f"{master.num_answers:>8,}  genuine answers, the slowest in {master.slowest_s:.3f} s\n"
        f"the worker grew by {growth_mb:.0f} MB at most, {last_mb:.0f} MB in the end; its log has "
        f"{len(log.splitlines())} lines"
    )
    num_handled = sum(counts.values())
    if keys and num_handled != thrower.num_parsed + master.num_answers:
        print(f"{num_handled:,} messages were handled, but no stranger's may be")
        return 1
    return 0


@contextmanager
def _worker(handler: str, keys: bool, directory: str) -> Iterator[Worker]:
    keys_directory = f"{directory}/keys" if keys else ""
    if keys:
        new_keys(keys_directory)
    worker = Worker(handler, keys_directory, Path(directory) / "log")
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait()


def _wait_for_answers(master: Master, number: int) -> None:
    while master.num_answers < number and master.error is None:
        time.sleep(0.01)
    if master.error is not None:
        raise WorkerError(master.error)


def _check(worker: Worker, master: Master) -> None:
    worker.check()
    if master.error is not None:
        raise WorkerError(master.error)


def _host(address: str) -> tuple[str, int]:
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    return host, int(port)


def main(throws: int = 10_000, seed: int | None = None, keys: bool = False) -> Any:
    """Throw malformed things at a live worker.

    Args:
        throws: How many.
        seed: Seed of all choices; the default is another one each time.
        keys: Whether the worker has keys (CURVE).
    """
    seed = random.randrange(2**32) if seed is None else seed
    sys.exit(fuzz(throws=throws, seed=seed, keys=keys))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    CLI(main, as_positional=False)
