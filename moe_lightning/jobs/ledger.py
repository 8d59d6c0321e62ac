"""The ledger: one checksummed line for each part that is finished, in logs that are only added to.

    {"part": "job/3f2a/parts/000002-00000017.part", "bytes": 512, "sha256": "...", ...}\t5d1f09aa

Every writer of every epoch has a log of its own. A new epoch seals those of older ones: it writes
down how long they are. What a run that should be dead adds after that does not count.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PartEntry:
    """One line: a part that is complete and safe.

    Attributes:
        part: Its file.
        num_bytes: Its size.
        sha256: Of its content.
        num_rows: Rows in it.
        num_errors: How many of these failed.
    """

    part: str
    num_bytes: int
    sha256: str
    num_rows: int
    num_errors: int


def encode(entry: PartEntry) -> bytes:
    """Make a line of an entry.

    Args:
        entry: The entry.

    Returns:
        The line, with its checksum and line end.
    """
    return checked_line(asdict(entry))


def decode(log: bytes) -> list[PartEntry]:
    """Read a log.

    Args:
        log: Its bytes, of which the last line, or any, may be damaged.

    Returns:
        Its good lines.
    """
    return [PartEntry(**fields) for fields in good_lines(log)]


def checked_line(fields: Mapping[str, Any]) -> bytes:
    """Make a line of any fields, with a checksum and the line end."""
    text = json.dumps(fields).encode()
    return b"%s\t%08x\n" % (text, zlib.crc32(text))


def good_lines(log: bytes) -> list[dict[str, Any]]:
    """Read the lines that are as `checked_line` made them."""
    found = []
    for line in log.split(b"\n")[:-1]:
        text, tab, checksum = line.rpartition(b"\t")
        if tab and checksum == b"%08x" % zlib.crc32(text):
            found.append(json.loads(text))
    return found


def sealed_bytes(log: str, epoch: int, claims: Mapping[int, bytes]) -> int | None:
    """How much of a log counts.

    Args:
        log: Its name.
        epoch: The epoch that it is of.
        claims: What each epoch wrote when it began; may be cut short, by a crash.

    Returns:
        Its length when the next epoch began: 0 if it was not there yet, None if there is no later
        epoch.
    """
    for later, claim in sorted(claims.items()):
        if later > epoch and (seals := _seals(claim)) is not None:
            return seals.get(log, 0)
    return None


def _seals(claim: bytes) -> dict[str, int] | None:
    try:
        seals: dict[str, int] = json.loads(claim)["seals"]
    except (ValueError, KeyError):  # its run crashed before it began, or the file is damaged
        return None
    return seals
