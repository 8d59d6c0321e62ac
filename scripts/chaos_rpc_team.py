"""Workers that were started by hand, as a person would who looks after them."""

import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import zmq
from chaos_rpc_nursery import Child, Nursery

from moe_lightning.transport.addresses import pulse_address
from moe_lightning.transport.pulse import parse_pong, ping

START_S = 60.0
_LISTENING = "listening on "
_FREED = "its experts are freed"


class HandWorker:
    """A worker that waits for one master after the other.

    Args:
        nursery: Where its process is born.
        address: Where it listens.
        checkpoint: Its checkpoint.
        log: Where what it says is kept.
    """

    def __init__(self, nursery: Nursery, address: str, checkpoint: str, log: Path) -> None:
        self.address = address
        self._nursery = nursery
        self._checkpoint = checkpoint
        self._log = log
        self.child: Child
        self.start()

    def start(self) -> None:
        """Start its process, in the place of one that has ended."""
        self._num_listening = self._count(_LISTENING) + 1
        self.child = self._nursery.start(
            ["worker", "--listen", self.address, "--model.checkpoint", self._checkpoint],
            log=self._log,
        )

    def kill(self) -> None:
        """End its process."""
        self.child.end()

    @property
    def num_freed(self) -> int:
        """How many masters it has given up."""
        return self._count(_FREED)

    def wait_until_listening(self) -> bool:
        """Wait until it listens.

        Returns:
            Whether it does.
        """
        return (
            wait_until(
                lambda: self._count(_LISTENING) >= self._num_listening or not self.child.is_there,
                START_S,
            )
            and self.child.is_there
        )

    def bytes_read(self) -> int:
        """Bytes of weights that it has read since its process began, by its pulse."""
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.connect(pulse_address(self.address))
            dealer.send(ping(0, 1))
            if not dealer.poll(5000):
                raise TimeoutError(f"{self.address} has no pulse")
            pulse = parse_pong(dealer.recv())
        assert pulse is not None, "a pong"
        return pulse.bytes_read

    def _count(self, text: str) -> int:
        return self._log.read_text(errors="replace").count(text) if self._log.exists() else 0


class LocalWorkers:
    """Processes that a master has started itself, seen from outside.

    Args:
        master: The master.
    """

    def __init__(self, master: Child) -> None:
        self._master = master
        self._addresses: dict[int, str] = {}
        self.pids: dict[int, int] = {}

    def look(self) -> None:
        """See whom the master has started."""
        try:
            children = Path(f"/proc/{self._master.pid}/task/{self._master.pid}/children")
            for pid in map(int, children.read_text().split()):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"--listen" in command:
                    address = command[command.index(b"--listen") + 1].decode()
                    number = int(address.rpartition("/")[2])
                    self.pids[number], self._addresses[number] = pid, address
        except OSError:  # gone meanwhile
            return

    def address(self, number: int) -> str:
        """Where a worker listens."""
        return self._addresses[number]

    def alive(self) -> list[int]:
        """Process numbers of those that are there."""
        return [pid for pid in self.pids.values() if is_alive(pid)]


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(is_so: Callable[[], bool], timeout_s: float) -> bool:
    """Look again and again.

    Args:
        is_so: What is waited for.
        timeout_s: Longest wait.

    Returns:
        Whether it is so.
    """
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def free_address() -> str:
    """A TCP address of the loopback interface that is free now, and so is the port after it.

    Below the ports that the kernel gives to whoever asks for any: it must stay free while a worker
    starts again.
    """
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
        return f"tcp://127.0.0.1:{port}"
