"""What ranks say when they end, and what one rank concludes from that and from silence."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed import DistError

from moe_lightning.errors import WorkersLostError

How = Literal["done", "failed", "interrupted", "lost"]
MAX_TEXT = 500

# What torch 2.13 says when a collective fails: RuntimeErrors from gloo, DistErrors from NCCL and
# the store.
_GROUP_FAILURE = re.compile(
    r"gloo/transport|Connection closed by peer|Connection reset by peer|Broken pipe|Socket closed"
    r"|Timed out waiting \d+ms|Application timeout caused pair closure|ProcessGroupNCCL"
    r"|NCCL (?:error|communicator)|wait timeout after"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is.

    Attributes:
        rank: Its number.
        host: Its machine.
        pid: Its process.
        address: Where its watch listens.
    """

    rank: int
    host: str
    pid: int
    address: tuple[str, int]

    def __str__(self) -> str:
        return f"rank {self.rank} on host {self.host} (process {self.pid})"


@dataclass(frozen=True, slots=True)
class Farewell:
    """What a rank says as it ends.

    Attributes:
        how: ``done`` with its work; ``failed`` by an error of its own; ``interrupted`` by a signal;
            ``lost`` others that it needs.
        text: Of an error of its own.
        victims: The ranks that it lost.
    """

    how: How
    text: str = ""
    victims: tuple[int, ...] = ()

    def to_fields(self) -> dict[str, Any]:
        """What ``from_fields`` takes.

        Returns:
            Fields that JSON can hold.
        """
        return {"how": self.how, "text": shorten(self.text), "victims": list(self.victims)}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Farewell | None":
        """Read what another process says, which may be anything.

        Args:
            fields: Its fields.

        Returns:
            The farewell, or None if it is none.
        """
        how, text, victims = (fields.get(name) for name in ("how", "text", "victims"))
        if how not in ("done", "failed", "interrupted", "lost"):
            return None
        if not isinstance(text, str) or not isinstance(victims, list):
            return None
        return cls(how, shorten(text), tuple(v for v in victims if isinstance(v, int)))


def shorten(text: str) -> str:
    """Make one printable line of a text.

    Args:
        text: Any text.

    Returns:
        Its beginning, without control characters.
    """
    line = " ".join(text.split())
    return "".join(c for c in line if c.isprintable())[:MAX_TEXT]


def is_group_failure(error: BaseException) -> bool:
    """Whether an error says that ranks could not talk, rather than that this one did wrong.

    Args:
        error: Any error.

    Returns:
        Whether.
    """
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and _GROUP_FAILURE.search(str(error)) is not None
    )


def is_interrupt(error: BaseException) -> bool:
    """Whether an error is how a signal or the user ends this rank.

    Args:
        error: Any error.

    Returns:
        Whether.
    """
    return isinstance(error, KeyboardInterrupt | SIGTERMException)


def find_cause(
    rank: int,
    places: Sequence[Place],
    *,
    farewells: Mapping[int, Farewell],
    silent: Collection[int],
    what_failed: str,
) -> BaseException | None:
    """Conclude why this rank cannot go on.

    Args:
        rank: This rank.
        places: All ranks.
        farewells: What other ranks said when they ended, in the order in which it came.
        silent: Ranks that neither answered nor said farewell.
        what_failed: What this rank was doing, for the message.

    Returns:
        An error that names the ranks to blame: one that failed by itself, before those that are
        silent, here or to another rank that looked; a KeyboardInterrupt if ranks were interrupted;
        None if no rank is to blame.
    """
    for other, farewell in farewells.items():
        if farewell.how == "failed":
            return WorkersLostError(
                f"{places[other]} ended with an error, and the other ranks with it, during "
                f"{what_failed}: {farewell.text}"
            )
    victims = set(silent)
    for farewell in farewells.values():
        victims |= {v for v in farewell.victims if 0 <= v < len(places)}
    if rank in victims:
        return WorkersLostError(
            f"the other ranks gave {places[rank]}, this one, up during {what_failed}: it had not "
            "answered. Was it stopped, or its machine asleep? The same command continues."
        )
    if victims:
        return lost(victims, places, what_failed=what_failed)
    if any(farewell.how == "interrupted" for farewell in farewells.values()):
        return KeyboardInterrupt()
    return None


def lost(
    victims: Collection[int],
    places: Sequence[Place],
    *,
    what_failed: str,
) -> WorkersLostError:
    """Make the error for ranks that are gone.

    Args:
        victims: These ranks.
        places: All ranks.
        what_failed: What was going on.

    Returns:
        The error.
    """
    who = " and ".join(str(places[victim]) for victim in sorted(victims))
    it = (
        "it was killed or stopped, or its machine"
        if len(victims) == 1
        else ("they were killed or stopped, or their machine")
    )
    do = "does" if len(victims) == 1 else "do"
    return WorkersLostError(
        f"{who} {do} not answer (during {what_failed}): {it} or network is gone. The same command "
        "continues."
    )
