"""World: the processes that torchrun or SLURM started, and how workers tell the master where they
are.

    rank 0, the master:  begin ─────────────▶ collect ──▶ ... ──▶ end
    the others:          begin ──▶ publish ──▶ ... until is_over

Only addresses go through the store, as text that is checked like any other input.
"""

import os
import socket
import time
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import DistError, Store, TCPStore  # type: ignore[attr-defined]

from moe_lightning.errors import UsageError
from moe_lightning.transport.addresses import check_address, is_loopback
from moe_lightning.workers.place import LOOPBACK, Place, read_place

POLL_S = 0.1
STORE_TIMEOUT_S = 10.0  # of one operation
MAX_TEXT = 4000
FAILURE = "error: "


def world_from_environment() -> "World | None":
    """The processes that torchrun or SLURM started together with this one.

    Returns:
        The same object each time; None if this process is alone, or in an interactive SLURM job.

    Raises:
        UsageError: If the launcher's variables make no sense.
    """
    place = read_place(os.environ)
    return None if place is None or place.size < 2 else _world(place)


@cache
def _world(place: Place) -> "World":
    """One for the process: launches are counted, and a port is bound once."""
    return World(place)


class World:
    """The processes that were started together; one object a process.

    Args:
        place: This process among them.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._launches = 0
        self._store: Store | None = None
        self._leash: socket.socket | None = None

    @property
    def rank(self) -> int:
        """This process's number; 0 is the master."""
        return self.place.rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.place.size

    def own_host(self) -> str:
        """The host by which the master reaches this process.

        Returns:
            A loopback address if the master is on this machine.

        Raises:
            UsageError: If the master's host is not known here.
        """
        if self.place.is_one_machine:
            return LOOPBACK
        family, address = self._resolve()
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: the kernel only picks the way
            return str(probe.getsockname()[0])

    # Each call of the trainer is one launch; all ranks count them alike.

    def begin(self, timeout_s: float) -> None:
        """Begin the next launch.

        Args:
            timeout_s: Longest wait for the store.

        Raises:
            UsageError: If the store cannot be opened or reached.
        """
        self._launches += 1
        self.store(timeout_s)

    def end(self) -> None:
        """On the master: let workers go that it has not told so itself."""
        if self._store is not None:
            try:
                self._store.set(self._key("over"), "")
                self._store.check([self._key("over")])  # it waits until the store has taken it
            except DistError:  # the store is gone, which says the same
                return

    def is_over(self) -> bool:
        """Whether the master is done with this launch, or gone."""
        assert self._store is not None, "begin comes first"
        try:
            return self._has_lost_store() or self._store.check([self._key("over")])
        except DistError:
            return True

    def publish(self, address: str) -> None:
        """On a worker: say where it listens."""
        self._tell(address)

    def publish_failure(self, reason: str) -> None:
        """On a worker: say why it will not come."""
        self._tell(f"{FAILURE}{reason}"[:MAX_TEXT])

    def collect(self, timeout_s: float, *, keys: bool, insecure: bool = False) -> list[str]:
        """On the master: where the workers are.

        Args:
            timeout_s: Longest wait for all of them.
            keys: Whether both sides have keys.
            insecure: Whether private addresses may go without.

        Returns:
            The addresses of ranks 1, 2, ...

        Raises:
            UsageError: If a rank does not come in time, cannot serve, or gives no proper address.
        """
        store = self.store(timeout_s)
        addresses: dict[int, str] = {}
        deadline_s = time.monotonic() + timeout_s
        while absent := [rank for rank in range(1, self.size) if rank not in addresses]:
            for rank in absent:
                if store.check([self._key(rank)]):
                    address = _said_address(rank, store.get(self._key(rank)))
                    addresses[rank] = check_address(
                        address, option=f"the address of rank {rank}", keys=keys, insecure=insecure
                    )
            if time.monotonic() > deadline_s:
                raise UsageError(self._absence(absent, timeout_s))
            time.sleep(POLL_S)
        return [addresses[rank] for rank in sorted(addresses)]

    def _absence(self, absent: list[int], timeout_s: float) -> str:
        ranks = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"
        return (
            f"{ranks} of {self.size} did not come within {timeout_s:.0f} s. Every process must "
            f"run the same command: start it by {self._how()}, look at what the others said, or "
            "wait longer with --trainer.strategy.join_timeout_s."
        )

    def _how(self) -> str:
        return "srun" if self.place.launcher == "SLURM" else "torchrun on every machine"

    # The store.

    def store(self, timeout_s: float) -> Store:
        """The store that all ranks share: torchrun's own, or one that rank 0 opens.

        Args:
            timeout_s: Longest wait for it.

        Returns:
            The store, kept for the life of the process.

        Raises:
            UsageError: If it cannot be opened or reached.
        """
        if self._store is None:
            fd = self._listen() if self.place.hosts_store else None
            self._leash = self._reach(timeout_s)
            try:
                self._store = TCPStore(
                    self.place.store_host,
                    self.place.store_port,
                    is_master=fd is not None,
                    timeout=timedelta(seconds=STORE_TIMEOUT_S),
                    wait_for_workers=False,
                    master_listen_fd=fd,
                )
            except DistError as error:
                raise UsageError(f"{self._where()}: {error}.") from error
        return self._store

    def _listen(self) -> int:
        """A socket on the master's own address only: by itself, the store listens on all."""
        family, address = self._resolve()
        if not self.place.is_one_machine and is_loopback(str(address[0])):
            raise UsageError(
                f"{self._where()}: {self.place.store_host} is {address[0]} here, where other "
                "machines cannot come. Set MASTER_ADDR to an address that they can reach."
            )
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(socket.SOMAXCONN)
        except OSError as error:
            listener.close()
            raise UsageError(
                f"{self._where()}: rank 0 cannot listen there ({error.strerror}). Set MASTER_PORT "
                "to a free port, and MASTER_ADDR to an address of the first machine."
            ) from error
        return listener.detach()  # the store closes it

    def _reach(self, timeout_s: float) -> socket.socket:
        """A connection that says nothing, and ends when the store does."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                leash = socket.create_connection(
                    (self.place.store_host, self.place.store_port), timeout=STORE_TIMEOUT_S
                )
            except OSError as error:
                if time.monotonic() > deadline_s:
                    raise UsageError(
                        f"{self._where()}: nobody listens there after {timeout_s:.0f} s ({error}). "
                        f"Is rank 0 running? Start the command by {self._how()}."
                    ) from error
                time.sleep(POLL_S)
            else:
                leash.setblocking(False)
                return leash

    def _has_lost_store(self) -> bool:
        """Whether the leash has ended; the store's own client would print pages about that."""
        assert self._leash is not None, "it comes with the store"
        try:
            return self._leash.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _resolve(self) -> tuple[socket.AddressFamily, Any]:
        try:
            found = socket.getaddrinfo(
                self.place.store_host, self.place.store_port, type=socket.SOCK_STREAM
            )
        except OSError as error:
            raise UsageError(f"{self._where()}: the host is not known here ({error}).") from error
        family, _, _, _, address = found[0]
        return family, address

    def _where(self) -> str:
        return (
            f"the processes that {self.place.launcher} started meet at "
            f"{self.place.store_host}:{self.place.store_port} (MASTER_ADDR:MASTER_PORT)"
        )

    def _key(self, name: str | int) -> str:
        assert self._launches > 0, "begin comes first"
        return f"moe_rpc/{self.place.attempt}/{self._launches}/{name}"

    def _tell(self, text: str) -> None:
        assert self._store is not None, "begin comes first"
        self._store.set(self._key(self.rank), text)


def _said_address(rank: int, said: bytes) -> str:
    text = said[:MAX_TEXT].decode(errors="replace")
    if text.startswith(FAILURE):
        raise UsageError(f"rank {rank} cannot serve: {text.removeprefix(FAILURE)}")
    return text
