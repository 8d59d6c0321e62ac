"""Job: one run over the rows of an input, from the first start to the finished files.

    output_dir/
      predictions.jsonl  errors.jsonl  _SUCCESS      when all rows are done
      job/plan.json                                  identity and number of rows; names the folder
          lock
          ID/batches.jsonl                           rows of each batch
             epochs/000001.json                      a run has begun, and what it found
             ledger/000001-00000.jsonl               what a rank of it has committed
             parts/000001-00000017.part              rows: number, ok or error, JSON
          tmp/                                       files that are being written

_SUCCESS says that the files above it are whole, and are those of the job that plan.json names.
"""

import json
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from moe_lightning.errors import StoppedError
from moe_lightning.jobs.entry import ERRORS, PLAN, SUCCESS, enter, has_begun, tidy
from moe_lightning.jobs.epochs import accepted_entries, claim_epoch, epoch_name
from moe_lightning.jobs.ledger import PartEntry
from moe_lightning.jobs.part_writer import PartWriter, read_suspects
from moe_lightning.jobs.parts import Parts
from moe_lightning.jobs.plan import JobPlan
from moe_lightning.jobs.results import Format, write_errors, write_predictions
from moe_lightning.jobs.storage import TEMPORARY, Storage


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished job says.

    Attributes:
        num_rows: Rows of the input.
        num_predictions: Rows that were answered.
        num_errors: Rows that were not, and are in ``errors.jsonl``.
    """

    num_rows: int
    num_predictions: int
    num_errors: int


class Job:
    """A job of this process, the only one at work on it.

    Args:
        storage: Where it is; locked.
        plan: What is to do.
        id: Names its folder.

    Attributes:
        folder: Of all that is done so far.
        epoch: Number of this run.
        outcome: If the job was finished before: with what.
        is_done_N: For each row of the input, whether nothing is to do for it any more.
        num_done: Rows computed before, answered or not.
        num_failed: How many of these failed.
        suspects: Rows to compute alone, since one of them ended an earlier run.
        num_damaged: Parts that were not what the ledger says; their rows are computed again.
    """

    def __init__(self, storage: Storage, plan: JobPlan, id: str) -> None:
        self.storage = storage
        self.plan = plan
        self.id = id
        self.folder = f"job/{id}"
        self.epoch = 0
        self.outcome: Outcome | None = None
        self.is_done_N: NDArray[np.bool_] = np.zeros(plan.num_rows or 0, dtype=bool)
        self.num_done = self.num_failed = self.num_damaged = 0
        self.suspects: set[int] = set()
        self._damaged: set[str] = set()

    @classmethod
    def open(
        cls,
        storage: Storage,
        plan: JobPlan,
        *,
        restart: bool = False,
        retry_errors: bool = False,
        make_id: Callable[[], str] = lambda: secrets.token_hex(4),
    ) -> "Job":
        """Begin a job, or go on with it.

        Args:
            storage: Where it is, or is to be.
            plan: What is to do. One that does not know its rows always begins anew.
            restart: Whether to forget what another job did there.
            retry_errors: Whether rows that failed are computed again.
            make_id: Makes the name of a new job.

        Returns:
            The job; `close` it.

        Raises:
            UsageError: If another process is at work on it, or it is another job.
            StoppedError: If another run has begun there at the same time, where there are no locks.
        """
        storage.lock()
        try:
            job = cls(storage, plan, enter(storage, plan, restart=restart, make_id=make_id))
            job._recover(retry_errors=retry_errors)
        except BaseException:
            storage.close()
            raise
        return job

    def _recover(self, *, retry_errors: bool) -> None:
        success = json.loads(self.storage.read(SUCCESS) or b"null")
        if success is not None and success["job"] == self.id:
            is_there = all(self.storage.exists(name) for name in success["files"])
            if is_there and not (retry_errors and success["num_retryable"]):
                self.outcome = Outcome(**success["counts"])
                for rows in self.plan.batches:
                    self.is_done_N[rows] = True
                self.num_done = int(self.is_done_N.sum())
                self.num_failed = success["num_retryable"]
                if not self.num_failed:
                    self.storage.remove_folder(self.folder)  # a crash may have come before that
                return
            self.storage.remove(SUCCESS)
        self.epoch = claim_epoch(self.storage, self.folder)
        if not self._is_newest():  # it has replaced this job, and does not know its new epoch
            raise StoppedError("another run has begun there at the same time; this one stops.")
        self.suspects, guilty = read_suspects(self.storage, self.folder)
        if guilty and not retry_errors:
            errors = [(row, False, text) for row, text in sorted(guilty.items())]
            self.writer().commit("guilty", errors)
        parts, entries = Parts(self.storage), self._accepted()
        self._damaged = {entry.part for entry in entries if not parts.add(entry)}
        known = {entry.part for entry in entries}
        for name in self.storage.names(f"{self.folder}/parts"):
            if name not in known:
                self.storage.remove(name)  # of a run that ended between part and ledger
        rows_failed = parts.rows_failed
        self.num_damaged = len(self._damaged)
        if self.plan.num_rows is not None:
            self.is_done_N[parts.rows_ok] = True
            if not retry_errors:
                self.is_done_N[rows_failed] = True
            self.num_done = int(self.is_done_N.sum())
            self.num_failed = 0 if retry_errors else len(rows_failed)

    def _accepted(self) -> list[PartEntry]:
        entries = accepted_entries(self.storage, self.folder)
        return [entry for entry in entries if entry.part not in self._damaged]

    @property
    def is_finished(self) -> bool:
        """Whether nothing is to do: all files are there."""
        return self.outcome is not None

    def writer(self, rank: int = 0) -> PartWriter:
        """What a rank of this run commits with."""
        return PartWriter(self.storage, self.folder, epoch=self.epoch, rank=rank)

    def finish(
        self,
        input_errors: Callable[[], Iterable[tuple[int, str]]],
        format: Format = "jsonl",
        *,
        is_limited: bool = False,
    ) -> Outcome:
        """Write the files in the order of the input, and that the job is finished.

        Calling it again is legal, after a failure.

        Args:
            input_errors: Gives the rows that could not be read: number and JSON, sorted.
            format: Of the predictions.
            is_limited: Whether rows may be left to do; then the job stays open.

        Returns:
            The counts.

        Raises:
            OSError: If something could not be written.
            StoppedError: If parts were damaged since they were written.
        """
        if self.outcome is not None:
            return self.outcome
        parts = Parts(self.storage)
        parts.extend(self._accepted())
        predictions = f"predictions.{format}"
        try:
            if parts.num_damaged:
                raise StoppedError(
                    f"{parts.num_damaged} parts of {self.folder} were changed or removed since "
                    "they were written; the same command computes them again."
                )
            num_ok, num_failed = len(parts.rows_ok), len(parts.rows_failed)
            num_input = sum(1 for _ in input_errors())
            self._check_counts(num_ok + num_failed + num_input, is_limited=is_limited)
            check_epoch = self.writer().check_epoch  # files take long; each gets its name after it
            with self.storage.writer(predictions) as file:
                write_predictions(parts, file, format)
                check_epoch()
            if num_failed + num_input:
                with self.storage.writer(ERRORS) as file:
                    write_errors(parts, input_errors(), file)
                    check_epoch()
            else:
                check_epoch()
                self.storage.remove(ERRORS)
            check_epoch()
        finally:
            parts.close()
        outcome = Outcome(num_ok + num_failed + num_input, num_ok, num_failed + num_input)
        if self.plan.num_rows in (None, outcome.num_rows):
            files = [predictions, ERRORS] if outcome.num_errors else [predictions]
            self._close_books(outcome, files, num_retryable=num_failed)
        return outcome

    def _check_counts(self, num_rows: int, *, is_limited: bool) -> None:
        wanted = self.plan.num_rows
        if wanted is None or num_rows == wanted or (is_limited and num_rows < wanted):
            return
        raise StoppedError(
            f"{wanted:,} rows in, but {num_rows:,} rows in predictions and errors together. If "
            "several machines take part, all need the same --output_dir. The same command "
            "continues with the missing rows."
        )

    def _close_books(self, outcome: Outcome, files: list[str], *, num_retryable: int) -> None:
        success = {
            "job": self.id,
            "counts": asdict(outcome),
            "files": files,
            "num_retryable": num_retryable,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.storage.write(SUCCESS, json.dumps(success, indent=2).encode() + b"\n")
        self.outcome = outcome
        self.storage.remove_folder(TEMPORARY)
        # Failed rows can be computed again (--retry_errors), which needs the others' answers.
        if not num_retryable:
            self.storage.remove_folder(self.folder)

    def close(self) -> None:
        """Let others at it. A job that nobody can continue, or has begun, leaves nothing behind."""
        if self.outcome is None:
            with suppress(OSError):
                if self._is_newest() and (
                    self.plan.num_rows is None or not has_begun(self.storage, self.id)
                ):
                    self.storage.remove(PLAN)
                    tidy(self.storage, None)  # not the lock: who comes next may have it already
                    if not self.storage.names("job"):
                        self.storage.remove_folder("job")
        self.storage.close()

    def _is_newest(self) -> bool:
        stored = json.loads(self.storage.read(PLAN) or b"{}")
        return stored.get("id") == self.id and not self.storage.exists(
            epoch_name(self.folder, self.epoch + 1)
        )
