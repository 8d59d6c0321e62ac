"""Every single byte of what a job remembers is damaged: rows are computed again, never wrong."""

import pytest
from simulate_jobs_disk import Process, StrictDisk
from small_job import BATCHES, PLAN, ROOT, answer, check_finished, input_errors

from moe_lightning.errors import StoppedError
from moe_lightning.jobs import Job, LocalStorage, work_units


def half_done():
    """Two runs, of which the first committed a batch, and the second another one."""
    disk = StrictDisk()
    for number in (0, 1):
        job = Job.open(LocalStorage(ROOT, Process(disk)), PLAN)
        rows = [answer(row) for row in BATCHES[number]]
        job.writer().commit(f"{number:08d}", rows)
        job.close()
    return disk, job.folder


def go_on(disk):
    """Do the rest; returns the rows that were computed."""
    job = Job.open(LocalStorage(ROOT, Process(disk)), PLAN)
    computed = set()
    for unit in work_units(BATCHES, is_done_N=job.is_done_N):
        job.writer().commit(f"{unit.number:08d}", [answer(row) for row in unit.rows])
        computed.update(unit.rows.tolist())
    job.finish(input_errors)
    job.close()
    check_finished(disk)
    return computed


def damaged(content):
    """The content with a byte flipped, cut off there, or with zeros from there on."""
    for at in range(len(content)):
        yield content[:at] + bytes([content[at] ^ (1, 64)[at % 2]]) + content[at + 1 :]
        if at % 4 == 0:
            yield content[:at]
            yield content[:at] + b"\0" * (len(content) - at)


REST = {2, 6}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("ledger/000001-00000.jsonl", {0, 4}),
        ("ledger/000002-00000.jsonl", {1, 3}),
        ("parts/000001-00000000.part", {0, 4}),
        ("parts/000002-00000001.part", {1, 3}),
    ],
)
def test_only_the_rows_of_what_was_damaged_are_computed_again(name, rows):
    disk, folder = half_done()
    path = ROOT / folder / name
    for content in damaged(disk.content(path)):
        disk, folder = half_done()
        disk.find(ROOT / folder / name).data = content
        assert go_on(disk) in (REST, REST | rows)
    disk, folder = half_done()
    LocalStorage(ROOT, Process(disk)).remove(f"{folder}/{name}")
    assert go_on(disk) == REST | rows


def test_the_claim_of_an_epoch_is_damaged():
    """What it sealed may count more or less then, but the files are right."""
    for name in ("000001", "000002"):
        disk, folder = half_done()
        for content in damaged(disk.content(ROOT / folder / f"epochs/{name}.json")):
            disk, folder = half_done()
            disk.find(ROOT / folder / f"epochs/{name}.json").data = content
            assert go_on(disk) >= REST


def test_a_part_that_is_damaged_while_the_job_runs_stops_its_end():
    disk, folder = half_done()
    job = Job.open(LocalStorage(ROOT, Process(disk)), PLAN)
    job.writer().commit("00000002", [answer(row) for row in BATCHES[2]])
    disk.find(ROOT / folder / "parts/000001-00000000.part").data += b"x"
    with pytest.raises(StoppedError, match=r"1 parts of .* were changed or removed"):
        job.finish(input_errors)
    job.close()
    assert disk.content(ROOT / "_SUCCESS") is None
    assert go_on(disk) == {0, 4}
