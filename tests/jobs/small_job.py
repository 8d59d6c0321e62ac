"""A small job over seven rows, of which one fails and one is bad, run on a simulated disk."""

import json
from pathlib import Path

import numpy as np

from moe_lightning.jobs import Job, JobPlan, LocalStorage, Patience, work_units

ROOT = Path("/run")
FAILS, BAD = 3, 5
BATCHES = [np.array(rows) for rows in ([4, 0], [3, 1], [2, 6])]
PLAN = JobPlan({"seed": 1}, 7, BATCHES)
PREDICTIONS = b"".join(b'{"id": %d}\n' % n for n in (0, 1, 2, 4, 6))
ALL_PREDICTIONS = b"".join(b'{"id": %d}\n' % n for n in (0, 1, 2, 3, 4, 6))
ERRORS = b'{"error": 3}\n{"bad": 5}\n'
ALL_ERRORS = b'{"bad": 5}\n'


def answer(row, *, fails=True):
    """What every process computes for a row."""
    if row == FAILS and fails:
        return int(row), False, json.dumps({"error": int(row)})
    return int(row), True, json.dumps({"id": int(row)})


def input_errors():
    yield BAD, json.dumps({"bad": BAD})


class Clock:
    """Time that passes while somebody sleeps."""

    def __init__(self):
        self.now_s = 0.0

    def sleep(self, seconds):
        self.now_s += seconds


def run_job(process, safe, *, plan=PLAN, wait_s=0.0, fails=True, **options):
    """Run a job to its end.

    Args:
        process: The process on a simulated disk.
        safe: Rows whose commit came back, in any run: none may be computed again. Added to.
        plan: The job.
        wait_s: How long to wait for a full disk.
        fails: Whether the row that fails does.
        options: Of ``Job.open``.

    Returns:
        The outcome.
    """
    clock = Clock()
    patience = Patience(wait_s, 1.0, clock=lambda: clock.now_s, sleep=clock.sleep, say=str)
    job = Job.open(LocalStorage(ROOT, process), plan, **options)
    try:
        if not job.is_finished:
            writer = job.writer()
            for unit in work_units(plan.batches, is_done_N=job.is_done_N):
                assert not safe & set(unit.rows.tolist()), "a safe row is computed again"
                rows = [answer(row, fails=fails) for row in unit.rows]
                patience(lambda u=unit, r=rows: writer.commit(f"{u.number:08d}", r), "disk")
                safe.update(unit.rows.tolist())
        return patience(lambda: job.finish(input_errors), "disk")
    finally:
        job.close()


def check_finished(disk, *, predictions=PREDICTIONS, errors=ERRORS):
    """The files are those of an undisturbed run, and nothing is left over."""
    assert disk.content(ROOT / "predictions.jsonl") == predictions
    assert disk.content(ROOT / "errors.jsonl") == errors
    counts = json.loads(disk.content(ROOT / "_SUCCESS"))["counts"]
    num_errors = errors.count(b"\n")
    assert counts == {"num_rows": 7, "num_predictions": 7 - num_errors, "num_errors": num_errors}
    assert not [file for file in disk.files() if "/tmp/" in file]
