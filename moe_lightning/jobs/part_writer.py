"""PartWriter: commits what one rank has computed, a part at a time."""

import hashlib
from collections.abc import Iterable, Mapping

from moe_lightning.errors import StoppedError
from moe_lightning.jobs.epochs import epoch_name
from moe_lightning.jobs.ledger import PartEntry, checked_line, encode, good_lines
from moe_lightning.jobs.storage import Storage

SUSPECTS = "suspects"


class PartWriter:
    """Writes parts and ledger lines of one rank in one epoch of a job.

    Args:
        storage: Where the job is.
        folder: The job's folder there.
        epoch: Number of this run of the job.
        rank: Number of this writer in the run.
    """

    def __init__(self, storage: Storage, folder: str, *, epoch: int, rank: int = 0) -> None:
        self._storage = storage
        self._folder = folder
        self._epoch = epoch
        self._log = f"{folder}/ledger/{epoch:06d}-{rank:05d}.jsonl"

    def commit(self, name: str, rows: Iterable[tuple[int, bool, str]]) -> PartEntry:
        """Make rows part of the job's result; after this they are never computed again.

        Committing the same part again is legal, after a failure.

        Args:
            name: The part's name, its own among all of the epoch.
            rows: Row number, whether it was answered, and its JSON.

        Returns:
            The line of the ledger.

        Raises:
            OSError: If it could not be written; then nothing has been committed.
            StoppedError: If another run of the job has begun since.
        """
        lines, num_errors = [], 0
        for row, is_ok, text in rows:
            lines.append(f"{row}\t{'ok' if is_ok else 'error'}\t{text}\n")
            num_errors += not is_ok
        content = "".join(lines).encode()
        entry = PartEntry(
            part=f"{self._folder}/parts/{self._epoch:06d}-{name}.part",
            num_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            num_rows=len(lines),
            num_errors=num_errors,
        )
        self.check_epoch()
        self._storage.write(entry.part, content)
        self._storage.append(self._log, encode(entry))
        return entry

    def suspect(self, errors: Mapping[int, str]) -> None:
        """Note rows that ended the run: the next one computes each of them alone, and one that was
        alone already is a failed row from then on.

        Args:
            errors: The rows, and what ``errors.jsonl`` would say of each.

        Raises:
            OSError: If it could not be written.
        """
        line = checked_line({"errors": {str(row): text for row, text in errors.items()}})
        self._storage.append(self._log.replace("/ledger/", f"/{SUSPECTS}/"), line)

    def has_begun(self) -> bool:
        """Whether this process sees that its run has begun."""
        return self._storage.exists(epoch_name(self._folder, self._epoch))

    def check_epoch(self) -> None:
        """Raise StoppedError if a later run of the job has begun, or of another one there."""
        is_newest = not self._storage.exists(epoch_name(self._folder, self._epoch + 1))
        if not (is_newest and self.has_begun()):
            raise StoppedError(
                "another run of this job has begun since and goes on with it; this one stops."
            )


def read_suspects(storage: Storage, folder: str) -> tuple[set[int], dict[int, str]]:
    """Which rows ended earlier runs.

    Args:
        storage: Where the job is.
        folder: The job's folder there.

    Returns:
        Rows that were together with others then, and rows that were alone, with their errors.
    """
    together: set[int] = set()
    alone: dict[int, str] = {}
    for log in storage.logs(f"{folder}/{SUSPECTS}").values():
        for line in good_lines(log):
            errors = {int(row): text for row, text in line["errors"].items()}
            if len(errors) == 1:
                alone |= errors
            else:
                together |= errors.keys()
    return together, alone
