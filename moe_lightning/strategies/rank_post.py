"""RankPost: short letters between the watches of the ranks, one datagram each.

They carry no rows and decide no more than when a run ends; letters without the run's token are not
read.
"""

import json
import os
import secrets
import socket
from collections.abc import Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from moe_lightning.strategies.rank_failures import Place

_MAX_BYTES = 4096
_ELSEWHERE = ("192.0.2.1", 1)  # an address that is nobody's (RFC 5737): the way to the outside

T = TypeVar("T")


class RankPost:
    """This rank's socket, and where the others listen.

    Args:
        rank: This rank.
        places: All ranks, in order.
        listening: The socket, whose address is in ``places``.
        token: What tells this run's letters from others.
    """

    def __init__(
        self, rank: int, places: list[Place], listening: socket.socket, token: str
    ) -> None:
        self.rank = rank
        self.places = places
        self._socket = listening
        self._token = token

    @classmethod
    def open(cls, group: dist.ProcessGroup) -> "RankPost":
        """Open the post on all ranks of a run together.

        Args:
            group: All ranks, on a group of the host's.

        Returns:
            This rank's.
        """
        hosts = _gather((socket.gethostname(), secrets.token_hex(8)), group)
        listening, host = _listen(is_one_machine=len({host for host, _ in hosts}) == 1)
        address = (host, listening.getsockname()[1])
        own = Place(group.rank(), hosts[group.rank()][0], os.getpid(), address)
        return cls(own.rank, _gather(own, group), listening, token=hosts[0][1])

    @property
    def others(self) -> list[int]:
        """The other ranks."""
        return [place.rank for place in self.places if place.rank != self.rank]

    def send(self, other: int, what: str, **fields: Any) -> None:
        """Send a letter; whether it arrives is not known.

        Args:
            other: To whom.
            what: Its kind.
            **fields: What else it says, for JSON.
        """
        said = {"token": self._token, "rank": self.rank, "what": what, **fields}
        try:
            self._socket.sendto(json.dumps(said).encode(), self.places[other].address)
        except OSError:  # unreachable, as its silence will show
            return

    def receive(self, wait_s: float) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Wait for the next letter.

        Args:
            wait_s: Longest wait.

        Yields:
            From whom it is, its kind, and all that it says; nothing if none came or it is foreign.
        """
        self._socket.settimeout(wait_s)
        try:
            said = json.loads(self._socket.recv(_MAX_BYTES))
            token, other, what = said["token"], said["rank"], said["what"]
        except (OSError, ValueError, KeyError, TypeError):  # none, or not one of ours
            return
        if token == self._token and other in self.others:
            yield other, str(what), said

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _gather(own: T, group: dist.ProcessGroup) -> list[T]:
    all_of_them: list[Any] = [None] * group.size()
    dist.all_gather_object(all_of_them, own, group=group)
    return all_of_them


def _listen(*, is_one_machine: bool) -> tuple[socket.socket, str]:
    """A socket where the other ranks reach it, and its host."""
    family, host = socket.AF_INET, "127.0.0.1"
    if not is_one_machine:
        family, host = _seen_from_outside()
    listening = socket.socket(family, socket.SOCK_DGRAM)
    listening.bind((host, 0))
    return listening, host


def _seen_from_outside() -> tuple[socket.AddressFamily, str]:
    master = os.environ.get("MASTER_ADDR") or socket.gethostname()
    family, *_, address = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
    host = _own_end(family, address)
    if host == "::1" or host.startswith("127."):  # the master's hosts file may say so of itself
        family, host = socket.AF_INET, _own_end(socket.AF_INET, _ELSEWHERE)
    return family, host


def _own_end(family: socket.AddressFamily, address: Any) -> str:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing: the kernel only picks the way
        return str(probe.getsockname()[0])
