"""A crash, a full disk or a failing one at each single operation on files, and then the same
command again."""

import errno
from random import Random

import pytest
from simulated_disk import Crash, Disk, Process
from small_job import ALL_ERRORS, ALL_PREDICTIONS, FAILS, check_finished, run_job

from moe_lightning.errors import StoppedError

SEEDS = 4


def num_operations(prepare=lambda: (Disk(), set()), **options):
    disk, safe = prepare()
    process = Process(disk)
    run_job(process, safe, **options)
    return process.num_operations


def run_disturbed(process, safe, **options):
    try:
        run_job(process, safe, **options)
    except (Crash, OSError, StoppedError):
        pass
    else:
        return True
    process.die()
    return False


def test_an_undisturbed_job_and_its_files():
    disk = Disk()
    outcome = run_job(Process(disk), set())
    assert (outcome.num_rows, outcome.num_predictions, outcome.num_errors) == (7, 5, 2)
    check_finished(disk)
    assert num_operations() > 60


@pytest.mark.parametrize("how", ["crash", "torn"])
@pytest.mark.parametrize("seed", [None, *range(SEEDS)], ids=lambda s: f"power cut {s}"[:11])
def test_a_crash_at_every_operation(how, seed):
    for k in range(num_operations()):
        disk, safe = Disk(), set()
        run_disturbed(Process(disk, {k: how}), safe)
        if seed is not None:
            disk.power_cut(Random(1000 * seed + k))
        run_job(Process(disk), safe)
        check_finished(disk)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_crash_at_every_operation_of_the_run_that_continues(seed):
    random = Random(seed)
    first = num_operations()
    for k in range(0, first, 7):
        later = 0
        while True:
            disk, safe = Disk(), set()
            run_disturbed(Process(disk, {k: "crash"}), safe)
            disk.power_cut(random)
            is_over = run_disturbed(Process(disk, {later: random.choice(["crash", "torn"])}), safe)
            if random.random() < 0.5:
                disk.power_cut(random)
            run_job(Process(disk), safe)
            check_finished(disk)
            if is_over:
                break
            later += 1


def finished_with_a_failure():
    disk, safe = Disk(), set()
    run_job(Process(disk), safe)
    return disk, safe - {FAILS}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_crash_at_every_operation_of_retrying_errors(seed):
    options = {"retry_errors": True, "fails": False}
    for k in range(num_operations(finished_with_a_failure, **options)):
        disk, safe = finished_with_a_failure()
        run_disturbed(Process(disk, {k: "crash"}), safe, **options)
        disk.power_cut(Random(1000 * seed + k))
        run_job(Process(disk), safe - {FAILS}, **options)
        check_finished(disk, predictions=ALL_PREDICTIONS, errors=ALL_ERRORS)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_crash_at_every_operation_of_a_restart(seed):
    def half_done():
        disk = Disk()
        run_disturbed(Process(disk, {40: "crash"}), set())
        return disk, set()

    for k in range(num_operations(half_done, restart=True)):
        disk, safe = half_done()
        run_disturbed(Process(disk, {k: "crash"}), safe, restart=True)
        disk.power_cut(Random(1000 * seed + k))
        run_job(Process(disk), set(), restart=True)
        check_finished(disk)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_failing_disk_at_every_operation(fault):
    """The run ends in good order, leaves no temporary file, and the next one continues."""
    for k in range(num_operations()):
        disk, safe = Disk(), set()
        process = Process(disk, {k: fault})
        run_disturbed(process, safe)
        assert process.log[k] == "remove" or not [f for f in disk.files() if "/tmp/" in f]
        run_job(Process(disk), safe)
        check_finished(disk)


@pytest.mark.parametrize("num_faults", [1, 2, 3])
def test_a_disk_that_is_full_for_a_while_is_waited_for(num_faults):
    begun = 0
    for k in range(num_operations()):
        disk, safe = Disk(), set()
        faults = {k + n: errno.ENOSPC for n in range(num_faults)}
        process = Process(disk, faults)
        try:
            run_job(process, safe, wait_s=100.0)
        except OSError:  # before the first row was computed
            assert not safe
            process.die()
            run_job(Process(disk), safe)
        else:
            begun += 1
        check_finished(disk)
    assert begun > 40


def test_a_disk_that_stays_full_ends_the_run_with_what_was_committed():
    disk, safe = Disk(), set()
    process = Process(disk)

    def no_more_files(path):
        if safe:
            raise OSError(errno.ENOSPC, "full")
        return Process.create(process, path)

    process.create = no_more_files
    with pytest.raises(StoppedError, match="the disk is full"):
        run_job(process, safe, wait_s=30.0)
    assert safe == {4, 0}
    assert not [file for file in disk.files() if "/tmp/" in file]
    process.die()
    run_job(Process(disk), safe)
    check_finished(disk)
