"""Epochs: the runs of a job, one after the other, and what each of them adds to the ledger.

A run that a newer one has taken over from, because it was thought dead, may still write: its parts
have names of their own, and its lines of the ledger come after the newer run's seal.
"""

import json
import os
import socket
from datetime import UTC, datetime

from moe_lightning.jobs.ledger import PartEntry, decode, sealed_bytes
from moe_lightning.jobs.storage import Storage


def claim_epoch(storage: Storage, folder: str) -> int:
    """Begin an epoch: from now on, what earlier ones add does not count.

    Args:
        storage: Where the job is.
        folder: The job's folder there.

    Returns:
        Its number; the first is 1.
    """
    while True:
        newest = newest_epoch(storage, folder)
        logs = storage.logs(f"{folder}/ledger")
        # A power cut may bring logs back that were removed together with their epochs.
        epoch = 1 + max([newest, *map(epoch_of, logs)])
        claim = {
            "seals": {log: len(content) for log, content in logs.items()},
            "host": socket.gethostname(),
            "process": os.getpid(),
            "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if storage.claim(epoch_name(folder, epoch), json.dumps(claim).encode() + b"\n"):
            return epoch


def accepted_entries(storage: Storage, folder: str) -> list[PartEntry]:
    """Read the ledger.

    Args:
        storage: Where the job is.
        folder: The job's folder there.

    Returns:
        What counts of all logs, oldest epoch first.
    """
    names = storage.names(f"{folder}/epochs")
    claims = {epoch_of(name): storage.read(name) or b"" for name in names}
    entries = {}
    for log, content in sorted(storage.logs(f"{folder}/ledger").items()):
        for entry in decode(content[: sealed_bytes(log, epoch_of(log), claims)]):
            entries[entry.part] = entry
    return list(entries.values())


def epoch_name(folder: str, epoch: int) -> str:
    """The file that says that an epoch has begun."""
    return f"{folder}/epochs/{epoch:06d}.json"


def epoch_of(name: str) -> int:
    """The epoch that a file of a job belongs to, by its name."""
    return int(name.rpartition("/")[2][:6])


def newest_epoch(storage: Storage, folder: str) -> int:
    """The number of the last epoch that has begun; 0 before the first."""
    names = storage.names(f"{folder}/epochs")
    return epoch_of(names[-1]) if names else 0
