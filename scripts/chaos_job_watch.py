"""How far a predict job is, seen from outside, by its files.

planning ─▶ loading ─▶ predicting ─▶ merging
         an epoch    its first      all rows are
         has begun   ledger line    in the ledger
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Stage = Literal["planning", "loading", "predicting", "merging"]


@dataclass(slots=True)
class JobFiles:
    """The files of a job.

    Attributes:
        output: Its --output_dir.
        num_rows: Rows of the input.
        num_lines_before: Lines of the ledger before this start.
        num_rows_before: Rows in the ledger before this start.
        num_epochs_before: Starts of the job before this one.
        num_parts: Files of parts that this start has made, at the last look.
        num_lines: Lines of the ledger that it has made.
        num_rows_done: Rows in the ledger.
        most_rows: Rows of its largest part.
        begun_s: When each stage of this start was first seen, by the monotonic clock.
    """

    output: Path
    num_rows: int
    num_lines_before: int = 0
    num_rows_before: int = 0
    num_epochs_before: int = 0
    num_parts: int = 0
    num_lines: int = 0
    num_rows_done: int = 0
    most_rows: int = 0
    begun_s: dict[Stage, float] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        """Whether the job says so itself."""
        return (self.output / "_SUCCESS").exists()

    def begin(self) -> None:
        """A start of the command begins."""
        lines = ledger(self.output)
        self.num_lines_before = len(lines)
        self.num_rows_before = self.num_rows_done = _num_rows(lines)
        self.num_epochs_before = len(_names(self.output, "epochs"))

    def look(self) -> None:
        """See how far it is."""
        now_s = time.monotonic()
        if "merging" in self.begun_s:
            return
        epochs = _names(self.output, "epochs")
        if len(epochs) > self.num_epochs_before:
            self.begun_s.setdefault("loading", now_s)
        elif not self.is_finished:
            return
        lines = ledger(self.output)
        if self.is_finished:  # its ledger goes away
            self.num_rows_done = self.num_rows
        else:
            epoch = max(path.stem for path in epochs) if epochs else ""
            parts = _names(self.output, "parts")
            self.num_parts = sum(path.name.startswith(epoch) for path in parts)
            self.num_lines = len(lines) - self.num_lines_before
            self.num_rows_done = _num_rows(lines)
            self.most_rows = max((line["num_rows"] for line in lines), default=0)
        if self.num_lines > 0:
            self.begun_s.setdefault("predicting", now_s)
        if self.num_rows_done == self.num_rows:
            self.begun_s.setdefault("merging", now_s)


def _num_rows(lines: Sequence[Mapping[str, Any]]) -> int:
    return sum(line["num_rows"] for line in lines)


def ledger(output: Path) -> list[dict[str, Any]]:
    """The complete lines of the ledger of the job in a directory, without a look at checksums."""
    lines = []
    for log in sorted(output.glob("job/*/ledger/*")):
        try:
            whole = log.read_bytes().rpartition(b"\n")[0]
        except FileNotFoundError:
            continue  # the job has been finished meanwhile
        lines += [json.loads(line.rpartition(b"\t")[0]) for line in whole.split(b"\n") if line]
    return lines


def rows_done(output: Path) -> list[int]:
    """The rows of the parts in the ledger; a row that is in two of them is there twice."""
    rows = []
    for line in ledger(output):
        content = (output / line["part"]).read_bytes()
        rows += [int(row.partition(b"\t")[0]) for row in content.splitlines()]
    return rows


def rows_begun(marks: Path) -> list[tuple[int, list[int]]]:
    """The batches that ranks have begun: rank and rows."""
    if not marks.exists():
        return []
    return [(rank, rows) for rank, rows in map(json.loads, marks.read_text().splitlines())]


def _names(output: Path, folder: str) -> list[Path]:
    return list(output.glob(f"job/*/{folder}/*"))
