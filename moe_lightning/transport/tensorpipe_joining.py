"""How workers come into a master's session of torch.distributed.rpc, with a deadline.

master: Gathering  ── "join", a control message over zmq ──>  worker
        store      <── "I am there" ───────────────────────   worker
        agent      <── names and addresses, by the store ──>  agent
        reach      ── one call to each ────────────────────>  worker
"""

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore
from torch.distributed import rpc

from moe_lightning.errors import WorkersLostError

MAX_WORKERS = 4096
Join = Callable[[int, dict[str, object]], None]


@dataclass(frozen=True, slots=True)
class TensorPipeJoin:
    """What a master tells a worker so that it joins: the body of the control message "join".

    Args:
        store_host: Address of the master's store.
        store_port: Its port.
        rank: Number of the worker's process in the session, from 1; the master is 0.
        world_size: Number of processes.
    """

    store_host: str
    store_port: int
    rank: int
    world_size: int

    @property
    def is_elsewhere(self) -> bool:
        """Whether the master can be on another machine."""
        return not ipaddress.IPv4Address(self.store_host).is_loopback

    def body(self) -> dict[str, object]:
        """As the body of a control message."""
        return asdict(self)

    @classmethod
    def parse(cls, body: dict[str, object]) -> "TensorPipeJoin":
        """Check a body that came from the network.

        Args:
            body: What was received.

        Returns:
            What it says.

        Raises:
            ValueError: If it is anything but what :meth:`body` makes.
        """
        kinds = {"store_host": str, "store_port": int, "rank": int, "world_size": int}
        if set(body) != set(kinds):
            raise ValueError(f"join: expected {sorted(kinds)}, got {sorted(body)!s:.200}")
        for key, kind in kinds.items():
            # The very type: True is no number here.
            if type(body[key]) is not kind:
                raise ValueError(f"join: {key} = {str(body[key])!r:.100} is no {kind.__name__}")
        join = cls(**body)  # type: ignore[arg-type]  # checked above
        try:
            # A number, so that nobody's resolver is asked for what a stranger sent.
            number = ipaddress.IPv4Address(join.store_host)
        except ValueError:
            raise ValueError(
                f"join: store_host = {join.store_host!r:.100} is no IPv4 address"
            ) from None
        if not number.is_private or number.is_unspecified:
            raise ValueError(f"join: store_host = {join.store_host} is no private address")
        if not 1 <= join.store_port <= 65535:
            raise ValueError(f"join: store_port = {join.store_port} is no port")
        if not 1 <= join.rank < join.world_size <= MAX_WORKERS + 1:
            raise ValueError(f"join: rank = {join.rank} of {join.world_size} processes")
        return join


def process_name(rank: int) -> str:
    """Name of a process in torch.distributed.rpc.

    Args:
        rank: Its number; 0 is the master.
    """
    return f"worker{rank}" if rank else "master"


def arrival_key(rank: int) -> str:
    """Key of the store by which a worker says that it is there and about to start its agent.

    Args:
        rank: Number of its process.
    """
    return f"moe_lightning/arrived/{rank}"


class Gathering:
    """The workers of a session that is about to start, while the master waits for them.

    Args:
        join: Sends a worker, by its number, the body of the control message "join", and waits for
            its reply.
        host: Address of the store.
        port: Its port.
        names: Of the workers, for messages.
        timeout_s: Longest wait for all of them, from now on.
    """

    def __init__(
        self, join: Join, *, host: str, port: int, names: Sequence[str], timeout_s: float
    ) -> None:
        self.names = tuple(names)
        self.timeout_s = timeout_s
        self.deadline = time.monotonic() + timeout_s
        self.errors: dict[int, Exception] = {}
        self._threads: list[threading.Thread] = []
        for worker in range(len(names)):
            message = TensorPipeJoin(
                store_host=host,
                store_port=port,
                rank=worker + 1,
                world_size=len(names) + 1,
            )
            # A daemon: whatever `join` waits for can't keep the process from ending.
            thread = threading.Thread(
                target=self._join, args=(join, worker, message), name=f"join {worker}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def remaining_s(self) -> float:
        """Time that is left; never 0, which torch takes for ever."""
        return max(self.deadline - time.monotonic(), 0.001)

    def wait_for_arrivals(self, store: TCPStore) -> None:
        """Wait until every worker is there and about to start its agent.

        Only then is the master's agent started: its own wait tells neither who is missing nor that
        somebody has refused.

        Args:
            store: Where they tell. It isn't kept: when the master gives up, it must end, which
                ends the wait of the workers that are there, for whose replies threads wait here.

        Raises:
            WorkersLostError: If one refuses, or is missing when the time is over.
        """
        missing = set(range(len(self.names)))
        while missing := {each for each in missing if not store.check([arrival_key(each + 1)])}:
            if self.errors:
                raise self.failure(self.errors)
            if time.monotonic() > self.deadline:
                raise self.failure(missing)
            time.sleep(0.01)

    def reach(self) -> None:
        """Call every worker once, which connects to it, and wait for the replies to "join".

        Raises:
            WorkersLostError: If one cannot be reached, or its reply is missing.
        """
        calls = [
            rpc.rpc_async(process_name(worker + 1), greet, timeout=self.remaining_s())
            for worker in range(len(self.names))
        ]
        for worker, call in enumerate(calls):
            try:
                call.wait()
            except RuntimeError as error:
                self.errors.setdefault(worker, error)
        for thread in self._threads:
            thread.join(self.remaining_s())
        without_reply = {each for each, thread in enumerate(self._threads) if thread.is_alive()}
        if without_reply or self.errors:
            raise self.failure(without_reply | set(self.errors))

    def failure(self, workers: Iterable[int]) -> WorkersLostError:
        """The error that names workers and why each did not join.

        Args:
            workers: Their numbers.
        """
        told = [
            f"worker {worker} ({self.names[worker]}): "
            f"{self.errors.get(worker, f'nothing came from it in {self.timeout_s:g} s')}"
            for worker in sorted(workers)
        ]
        error = WorkersLostError("tensorpipe: did not join the session: " + "; ".join(told))
        error.__cause__ = next(iter(self.errors.values()), None)
        return error

    def _join(self, join: Join, worker: int, message: TensorPipeJoin) -> None:
        try:
            join(worker, message.body())
        except Exception as error:
            self.errors[worker] = error


def greet() -> None:
    """What a master calls to see that it reaches a worker."""


def serve_store(host: str, *, timeout_s: float) -> TCPStore:
    """Make a store on a socket of ours: one that torch opens would listen on all interfaces.

    Args:
        host: The address to listen on.
        timeout_s: Longest wait of each call.

    Returns:
        The store, which listens until nobody refers to it. An agent must be given another that is
        connected to it: torch keeps the first agent of a process, and its store, for ever.
    """
    with socket.create_server((host, 0), backlog=MAX_WORKERS) as listening:
        port = listening.getsockname()[1]
        return TCPStore(
            host,
            port,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )


def connect_store(host: str, port: int, *, timeout_s: float) -> TCPStore:
    """Connect to a store; if nobody listens there, that is an error at once.

    Args:
        host: Its address.
        port: Its port.
        timeout_s: Longest wait of each call.

    Returns:
        The store.

    Raises:
        RuntimeError: If it cannot be reached.
    """
    try:
        # By itself torch goes on trying, for half as long again as it is told to.
        socket.create_connection((host, port), timeout_s).close()
    except OSError as error:
        raise RuntimeError(
            f"tensorpipe: the master's store at {host}:{port} cannot be reached: {error}"
        ) from error
    return TCPStore(
        host,
        port,
        is_master=False,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
