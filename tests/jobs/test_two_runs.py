"""Two live runs of one job: at each single operation of the first, a second one begins.

With locks there is never more than one. Without (object stores, some network file systems) the
newer run takes over, and whatever the older one still does changes nothing.
"""

import json
from contextlib import suppress

import pytest
from simulate_jobs_disk import Process, StrictDisk
from simulated_disk import Crash
from small_job import (
    ALL_ERRORS,
    BATCHES,
    ROOT,
    answer,
    check_finished,
    input_errors,
    run_job,
)

from moe_lightning.errors import StoppedError, UsageError
from moe_lightning.jobs import Job, JobPlan, LocalStorage, work_units
from moe_lightning.jobs.file_operations import FileOperations

OTHER = JobPlan({"seed": 2}, 7, BATCHES)
OTHER_PREDICTIONS = b"".join(b'{"other": %d}\n' % n for n in (0, 1, 2, 3, 4, 6))
PLAN = JobPlan({"seed": 1}, 7, BATCHES)


def open_job(process, plan=PLAN, **options):
    return Job.open(LocalStorage(ROOT, process), plan, **options)


def commit_all(job):
    for unit in work_units(BATCHES, is_done_N=job.is_done_N):
        rows = [answer(row) for row in unit.rows]
        job.writer().commit(f"{unit.number:08d}", rows)


def run_other(process):
    job = open_job(process, OTHER, restart=True)
    for unit in work_units(BATCHES, is_done_N=job.is_done_N):
        rows = [(int(row), True, json.dumps({"other": int(row)})) for row in unit.rows]
        job.writer().commit(f"{unit.number:08d}", rows)
    job.finish(input_errors)
    job.close()


def between(k, act):
    """Calls ``act`` before operation k, once."""

    def before(number):
        if number == k and not done:
            done.append(number)
            act()

    done = []
    return before


# With locks.


@pytest.mark.parametrize("begins", ["a job that is run", "a job that is only opened"])
def test_with_locks_a_run_is_never_alive_beside_another(begins):
    """The second run is refused, or gets the lock; as long as it has it, a third is refused."""
    num_taken = 0
    k = 0
    while True:
        disk, second = StrictDisk(), []

        def begin(disk=disk, second=second):
            with suppress(UsageError):
                second.append(open_job(Process(disk)))

        first = Process(disk, before=between(k, begin))
        try:
            if begins == "a job that is run":
                run_job(first, set())
            else:
                open_job(first).close()
        except UsageError:
            assert second, "a run is refused by nobody"
        else:
            if k >= first.num_operations:
                break
        for job in second:
            num_taken += 1
            with pytest.raises(UsageError, match="is at work there"):
                open_job(Process(disk))
            if not job.is_finished:
                commit_all(job)
            job.finish(input_errors)
            job.close()
            check_finished(disk)
        k += 1
    assert num_taken > 0


def test_who_closes_a_job_in_which_nothing_was_done_takes_nobodys_lock(tmp_path):
    """The same with real files and flock: the second run begins when the first removes the lock."""
    second = []

    class Operations(FileOperations):
        def remove(self, path):
            super().remove(path)
            if path.name == "lock" and not second:
                with suppress(UsageError):
                    second.append(Job.open(LocalStorage(tmp_path), PLAN))

    Job.open(LocalStorage(tmp_path, Operations()), PLAN).close()
    if not second:
        second.append(Job.open(LocalStorage(tmp_path), PLAN))
    with pytest.raises(UsageError, match="is at work there"):
        Job.open(LocalStorage(tmp_path), PLAN)
    commit_all(second[0])
    assert second[0].finish(input_errors).num_rows == 7
    second[0].close()


def test_a_run_that_begins_while_another_one_leaves_nothing_behind_is_not_hindered():
    """At each operation of the second one's beginning the first one closes: the second one is
    refused, or begins; no directory is missing."""
    num_begun = 0
    for k in range(8):
        disk = StrictDisk()
        first = open_job(Process(disk))
        process = Process(disk, before=between(k, first.close))
        try:
            second = open_job(process)
        except UsageError:
            first.close()
        else:
            num_begun += 1
            commit_all(second)
            second.finish(input_errors)
            second.close()
            check_finished(disk)
    assert 0 < num_begun < 8


# Without locks.


def older(process, safe):
    """A run that does what it can, until it notices that it was taken over from."""
    with suppress(StoppedError, UsageError, OSError, Crash):
        run_job(process, safe)


def positions():
    process = Process(StrictDisk(), has_locks=False)
    run_job(process, set())
    return range(process.num_operations)


def test_without_locks_a_newer_run_of_the_same_job_gives_the_same_files():
    for k in positions():
        disk, safe = StrictDisk(), set()

        def newer(disk=disk):
            run_job(Process(disk, has_locks=False), set())
            check_finished(disk)

        older(Process(disk, has_locks=False, before=between(k, newer)), safe)
        run_job(Process(disk, has_locks=False), set())
        check_finished(disk)


def test_without_locks_a_newer_run_half_done_takes_over():
    """It commits one part, the older one goes on, and then the newer one does the rest."""
    for k in positions():
        disk, newer = StrictDisk(), []

        def begin(disk=disk, newer=newer):
            job = open_job(Process(disk, has_locks=False))
            newer.append(job)
            for unit in work_units(BATCHES, is_done_N=job.is_done_N)[:1]:
                job.writer().commit(f"{unit.number:08d}", [answer(row) for row in unit.rows])

        process = Process(disk, has_locks=False, before=between(k, begin))
        older(process, set())
        with suppress(StoppedError, OSError):  # or the older one has finished first
            for unit in work_units(BATCHES, is_done_N=newer[0].is_done_N):
                rows = [answer(row) for row in unit.rows]
                newer[0].writer().commit(f"{unit.number:08d}", rows)
            newer[0].finish(input_errors)
        newer[0].close()
        run_job(Process(disk, has_locks=False), set())
        check_finished(disk)


def test_without_locks_a_run_that_another_job_replaced_changes_nothing():
    """The result is the newer one's. Only where both begin at once, and the first one writes the
    plan after the second one has finished, it is all the first one's."""
    num_first = 0
    for k in positions():
        disk = StrictDisk()

        def newer(disk=disk):
            run_other(Process(disk, has_locks=False))

        process = Process(disk, has_locks=False, before=between(k, newer))
        older(process, set())
        plan = json.loads(disk.content(ROOT / "job/plan.json"))
        assert json.loads(disk.content(ROOT / "_SUCCESS"))["job"] == plan["id"], process.log[k]
        if plan["identity"] == {"seed": 1}:
            assert not any("plan.json" in line for line in process.log[:k] if "rename" in line)
            check_finished(disk)
            num_first += 1
        else:
            assert disk.content(ROOT / "predictions.jsonl") == OTHER_PREDICTIONS, process.log[k]
            assert disk.content(ROOT / "errors.jsonl") == ALL_ERRORS, process.log[k]
    assert num_first < 10


@pytest.mark.parametrize("num_commits", [0, 1])
def test_without_locks_a_run_that_was_replaced_closes_and_leaves_the_newer_one_alone(num_commits):
    """It has not committed anything, so its own job would leave nothing behind."""
    disk = StrictDisk()
    old = open_job(Process(disk, has_locks=False))
    new = open_job(Process(disk, has_locks=False), OTHER, restart=True)
    for number in range(num_commits):
        new.writer().commit(f"{number:08d}", [(4, True, "{}")])
    before = disk.files()
    old.close()
    assert disk.files() == before
    new.writer().commit("a", [(0, True, "{}")])


def test_a_run_whose_rows_are_not_known_closes_and_leaves_the_newer_one_alone():
    disk = StrictDisk()
    old = open_job(Process(disk, has_locks=False), JobPlan())
    old.writer().commit("a", [(0, True, "{}")])
    new = open_job(Process(disk, has_locks=False), JobPlan())
    new.writer().commit("a", [(0, True, '{"id": "new"}')])
    old.close()
    new.finish(list)
    assert disk.content(ROOT / "predictions.jsonl") == b'{"id": "new"}\n'
