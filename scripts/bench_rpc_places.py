"""Where bench_rpc.py runs master and workers: side by side on loopback, or across a slow link.

loopback:  master ── 127.0.0.1 ── workers
link:      master (namespace a) ── delay, rate ── workers (namespace b), all of them behind it
"""

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

from link import Link, probe_between

Role = Literal["master", "worker"]


class Place:
    """Where processes run, and where workers listen.

    Args:
        name: For the report.
        link: The link between master and workers; None for loopback.
        keys: Directory of keys; without them only loopback can be used.
    """

    def __init__(self, name: str, *, link: Link | None = None, keys: Path | None = None) -> None:
        self.name = name
        self.link = link
        self.keys = keys
        self.master_host, self.worker_host = (
            ("127.0.0.1", "127.0.0.1") if link is None else (link.address("a"), link.address("b"))
        )
        self.interface = "lo" if link is None else "link0"
        self._ports = count(7000, 10)

    def python(self, role: Role, argv: Sequence[object]) -> list[str]:
        """The command line that runs a Python script or module there."""
        return self.command(role, [sys.executable, *argv])

    def command(self, role: Role, argv: Sequence[object]) -> list[str]:
        """The command line that runs a command there."""
        if self.link is None:
            return list(map(str, argv))
        return self.link.command("a" if role == "master" else "b", argv)

    def free_port(self) -> int:
        """A port that nobody has there, and neither the one after it."""
        if self.link is not None:
            return next(self._ports)
        while True:
            with socket.create_server(("127.0.0.1", 0)) as one:
                port: int = one.getsockname()[1]
                try:
                    with socket.create_server(("127.0.0.1", port + 1)):
                        return port
                except (OSError, OverflowError):
                    continue


@contextmanager
def make_place(
    name: Literal["loopback", "link"], *, delay_ms: float, rate_gbit: float, keys: Path
) -> Iterator[Place]:
    """A place, for as long as the block lasts.

    Args:
        name: Which.
        delay_ms: Of the link, one way.
        rate_gbit: Of the link, each way.
        keys: Directory of keys for the link.

    Yields:
        The place.
    """
    if name == "loopback":
        yield Place(name)
        return
    with Link(delay_ms=delay_ms, rate_gbit=rate_gbit) as link:
        yield Place(name, link=link, keys=keys)


def probe_place(place: Place, *, seconds: float) -> dict[str, float]:
    """Measure round trips and rates of plain TCP there, as link_probe.py names them."""
    return probe_between(
        partial(place.command, "master"),
        partial(place.command, "worker"),
        address=place.worker_host,
        port=place.free_port(),
        seconds=seconds,
    )
