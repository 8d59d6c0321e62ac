"""Crashes at each operation, and the same command again, on a disk that keeps only what it must.

More than test_every_operation: names and directories get lost one by one, files end in zeros, what
a sync could not write stays lost, and operations that only read fail too.
"""

import errno
import json
from random import Random

import pytest
from simulate_jobs_disk import Process, StrictDisk
from simulated_disk import Crash
from small_job import (
    ALL_ERRORS,
    ALL_PREDICTIONS,
    BATCHES,
    ERRORS,
    FAILS,
    PLAN,
    PREDICTIONS,
    ROOT,
    check_finished,
    input_errors,
    run_job,
)

from moe_lightning.errors import StoppedError, UsageError
from moe_lightning.jobs import Job, JobPlan, LocalStorage, work_units

SEEDS = 6
RESULT = {f"{ROOT}/{name}" for name in ("_SUCCESS", "predictions.jsonl", "errors.jsonl")}


def run_disturbed(process, safe, **options):
    """Run a job that may end in any way but a wrong result; returns whether it ended well."""
    try:
        run_job(process, safe, **options)
    except (Crash, OSError, StoppedError):
        process.die()
        return False
    return True


def num_operations(prepare=StrictDisk, **options):
    process = Process(prepare())
    run_job(process, set(), **options)
    return process.num_operations


@pytest.mark.parametrize("how", ["crash", "torn"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_power_cut_at_every_operation(how, seed):
    for k in range(num_operations()):
        disk, safe = StrictDisk(), set()
        run_disturbed(Process(disk, {k: how}), safe)
        disk.power_cut(Random(1000 * seed + k))
        run_job(Process(disk), safe)
        check_finished(disk)


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.parametrize("is_cut", [False, True], ids=["", "then the power goes"])
def test_an_operation_that_fails_and_the_run_that_goes_on(fault, is_cut):
    """A full disk is waited for. What was said to be safe is, even if a sync had failed before."""
    for k in range(num_operations()):
        disk, safe = StrictDisk(), set()
        process = Process(disk, {k: fault})
        run_disturbed(process, safe, wait_s=100.0)
        assert process.log[k].startswith("remove ") or not [f for f in disk.files() if "/tmp/" in f]
        if is_cut:
            process.die()
            disk.power_cut(Random(k))
        run_job(Process(disk), safe)
        check_finished(disk)


@pytest.mark.parametrize("is_cut", [False, True], ids=["kill", "power cut"])
def test_a_finished_job_leaves_only_its_files_whatever_happened(is_cut):
    options = {"fails": False}
    for k in range(num_operations(**options)):
        disk, safe = StrictDisk(), set()
        run_disturbed(Process(disk, {k: "crash"}), safe, **options)
        if is_cut:
            disk.power_cut(Random(k))
        run_job(Process(disk), safe, **options)
        check_finished(disk, predictions=ALL_PREDICTIONS, errors=ALL_ERRORS)
        assert disk.files() == RESULT | {f"{ROOT}/job/plan.json"}, f"operation {k}"


def test_what_is_finished_stays_finished_when_the_power_goes():
    for seed in range(20):
        disk = StrictDisk()
        run_job(Process(disk), set())
        disk.power_cut(Random(seed))
        assert disk.content(ROOT / "predictions.jsonl") == PREDICTIONS
        assert disk.content(ROOT / "_SUCCESS") is not None
        # What is removed without a sync may come back; the next run tidies up.
        assert run_job(Process(disk), {0, 1, 2, 3, 4, 6}).num_errors == 2
        check_finished(disk)


def finished_with_a_failure():
    disk = StrictDisk()
    run_job(Process(disk), set())
    return disk


@pytest.mark.parametrize("how", ["kill", "power cut"])
@pytest.mark.parametrize("again", ["the same command", "without retry_errors"])
def test_a_crash_at_every_operation_of_retrying_errors(how, again):
    """Who does not ask for it again gets the errors or the answers, and each row once."""
    options = {"retry_errors": True, "fails": False}
    seen = set()
    for k in range(num_operations(finished_with_a_failure, **options)):
        disk, safe = finished_with_a_failure(), {0, 1, 2, 4, 6}
        run_disturbed(Process(disk, {k: "torn"}), safe, **options)
        if how == "power cut":
            disk.power_cut(Random(k))
        if again == "the same command":
            run_job(Process(disk), safe - {FAILS}, **options)
            check_finished(disk, predictions=ALL_PREDICTIONS, errors=ALL_ERRORS)
        else:
            outcome = run_job(Process(disk), safe)
            seen.add(outcome.num_predictions)
            if outcome.num_predictions == 6:
                check_finished(disk, predictions=ALL_PREDICTIONS, errors=ALL_ERRORS)
            else:
                assert FAILS not in safe
                check_finished(disk, predictions=PREDICTIONS, errors=ERRORS)
    assert again == "the same command" or seen == {5, 6}


OTHER = JobPlan({"seed": 2}, 7, BATCHES)
OTHER_PREDICTIONS = b"".join(b'{"other": %d}\n' % n for n in (0, 1, 2, 3, 4, 6))


def run_other(process, **options):
    """Another job in the same place, with other answers, of which none fails."""
    job = Job.open(LocalStorage(ROOT, process), OTHER, **options)
    try:
        for unit in work_units(BATCHES, is_done_N=job.is_done_N):
            rows = [(int(row), True, json.dumps({"other": int(row)})) for row in unit.rows]
            job.writer().commit(f"{unit.number:08d}", rows)
        return job.finish(input_errors)
    finally:
        job.close()


def go_on(disk, is_old):
    """Run one of the two jobs; returns whether it was refused."""
    try:
        if is_old:
            run_job(Process(disk), set(), plan=PLAN)
            check_finished(disk)
        else:
            run_other(Process(disk))
            check_finished(disk, predictions=OTHER_PREDICTIONS, errors=ALL_ERRORS)
    except UsageError as error:
        if "seed: " not in str(error):
            raise
        return "refused"
    return "done"


@pytest.mark.parametrize("how", ["kill", "power cut"])
@pytest.mark.parametrize("before", ["half done", "finished"])
def test_a_crash_at_every_operation_of_a_restart_as_another_job(how, before):
    """Whoever comes next, of the old job or the new one, ends with one job's files, or is refused
    because the other one is there. There is never a marker above the files of the other."""

    def prepare():
        disk = StrictDisk()
        run_disturbed(Process(disk, {75: "crash"} if before == "half done" else {}), set())
        return disk

    process = Process(prepare())
    run_other(process, restart=True)
    results = set()
    for k in range(process.num_operations):
        for is_old_next in (True, False):
            disk = prepare()
            process = Process(disk, {k: "crash"})
            with pytest.raises(Crash):
                run_other(process, restart=True)
            if how == "power cut":
                disk.power_cut(Random(k))
            marker = json.loads(disk.content(ROOT / "_SUCCESS") or b"null")
            if marker is not None:
                is_other = disk.content(ROOT / "predictions.jsonl") == OTHER_PREDICTIONS
                is_old = disk.content(ROOT / "predictions.jsonl") == PREDICTIONS
                assert is_other or is_old
                plan = json.loads(disk.content(ROOT / "job/plan.json"))
                assert is_old or plan["id"] == marker["job"]
            results.add((is_old_next, go_on(disk, is_old_next)))
    assert (True, "done") in results
    assert (False, "done") in results


def test_a_restart_leaves_no_files_of_the_job_that_was_forgotten():
    """A crash at any operation, and then the command without restart: no file of another format."""

    def prepare():
        disk = StrictDisk()
        run_disturbed(Process(disk), set())
        process = Process(disk)
        with LocalStorage(ROOT, process).writer("predictions.parquet") as file:
            file.write(b"of the job that is to be forgotten")
        return disk

    process = Process(prepare())
    run_other(process, restart=True)
    for k in range(process.num_operations):
        disk = prepare()
        with pytest.raises(Crash):
            run_other(Process(disk, {k: "crash"}), restart=True)
        try:
            run_other(Process(disk))
        except UsageError:
            continue  # the old job is still there
        assert f"{ROOT}/predictions.parquet" not in disk.files(), f"operation {k}"


def test_logs_that_a_power_cut_brings_back_spoil_nothing():
    """A finished job's folder was removed, and its ledger is there again, without epochs and parts;
    the predictions were taken away: what is computed now is not taken for the damaged parts."""
    disk = StrictDisk()
    process = Process(disk)
    job = Job.open(LocalStorage(ROOT, process), OTHER)
    log = job.writer()
    for unit in work_units(BATCHES):
        rows = [(int(row), True, json.dumps({"other": int(row)})) for row in unit.rows]
        log.commit(f"{unit.number:08d}", rows)
    name = f"{job.folder}/ledger/000001-00000.jsonl"
    lines = disk.content(ROOT / name)
    job.finish(input_errors)
    job.close()
    storage = LocalStorage(ROOT, Process(disk))
    assert not storage.exists(job.folder)
    storage.append(name, lines)
    storage.remove("predictions.jsonl")
    assert run_other(Process(disk)).num_rows == 7
    check_finished(disk, predictions=OTHER_PREDICTIONS, errors=ALL_ERRORS)
