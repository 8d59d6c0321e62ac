"""What a job needs of a storage, of all kinds of them; and what is special to each."""

import subprocess
import sys

import numpy as np
import pytest
from simulate_jobs_disk import Process, StrictDisk
from small_job import ROOT

from moe_lightning.errors import UsageError
from moe_lightning.jobs import Job, JobPlan, LocalStorage, PartWriter, open_storage
from moe_lightning.jobs.url_storage import UrlStorage

PLACES = ("directory", "file", "memory", "simulated")


@pytest.fixture(params=PLACES)
def open_again(request, tmp_path):
    """Opens the same place as another process would."""
    disk = StrictDisk()
    return {
        "directory": lambda: open_storage(tmp_path / "run"),
        "file": lambda: open_storage(f"file://{tmp_path}/run"),
        "memory": lambda: open_storage(f"memory://{tmp_path.name}/run/"),
        "simulated": lambda: LocalStorage(ROOT, Process(disk)),
    }[request.param]


@pytest.fixture
def storage(open_again):
    return open_again()


def test_what_is_written_can_be_read_by_others(storage, open_again):
    assert storage.read("a/b/c.json") is None
    assert not storage.exists("a/b/c.json")
    storage.write("a/b/c.json", b"one")
    storage.write("a/b/c.json", b"two")
    other = open_again()
    assert other.read("a/b/c.json") == b"two"
    assert other.exists("a/b/c.json")
    with pytest.raises(FileNotFoundError):
        other.open("a/b/d.json")


def test_a_file_can_be_read_from_any_place(storage):
    storage.write("a/b", b"0123456789")
    with storage.open("a/b") as file:
        file.seek(7)
        assert file.read(2) == b"78"
        file.seek(0)
        assert file.read(1) == b"0"


def test_a_file_is_whole_or_not_there(storage):
    def write_half(name):
        with storage.writer(name) as file:
            file.write(b"half")
            raise ZeroDivisionError

    storage.write("job/x", b"old")
    for name in ("job/x", "job/y"):
        with pytest.raises(ZeroDivisionError):
            write_half(name)
    assert storage.read("job/x") == b"old"
    assert storage.names("job") in (["job/x"], ["job/tmp", "job/x"])
    assert storage.names("job/tmp") == []


def test_a_large_file_and_where_its_writer_is(storage):
    with storage.writer("job/large") as file:
        for n in range(5):
            assert file.tell() == n * 700_000
            file.write(bytes([n]) * 700_000)
    content = storage.read("job/large")
    assert len(content) == 3_500_000
    assert content[699_999:700_001] == b"\0\1"


def test_only_one_process_makes_a_file(storage, open_again):
    assert storage.claim("job/e/1", b"mine")
    assert not open_again().claim("job/e/1", b"yours")
    assert not storage.claim("job/e/1", b"again")
    assert storage.read("job/e/1") == b"mine"
    assert open_again().claim("job/e/2", b"yours")


def test_logs_are_read_in_the_order_in_which_they_were_written(storage, open_again):
    assert storage.logs("job/l") == {}
    lines = [b"%d\n" % n for n in range(12)]
    for line in lines:
        storage.append("job/l/1", line)
    storage.append("job/l/2", b"other\n")
    assert open_again().logs("job/l") == {"job/l/1": b"".join(lines), "job/l/2": b"other\n"}


def test_two_storages_of_a_process_add_to_one_log(storage, open_again):
    storage.append("job/l/1", b"a\n")
    other = open_again()
    other.append("job/l/1", b"b\n")
    other.append("job/l/1", b"c\n")
    assert open_again().logs("job/l") == {"job/l/1": b"a\nb\nc\n"}


def test_names_are_sorted_and_have_their_folder(storage):
    assert storage.names("job/p") == []
    for name in ("b", "a", "c/d"):
        storage.write(f"job/p/{name}", b"")
    assert storage.names("job/p") == ["job/p/a", "job/p/b", "job/p/c"]


def test_removing(storage, open_again):
    storage.remove("job/none")
    storage.remove_folder("job/none")
    for name in ("f/a", "f/g/b", "h"):
        storage.write(f"job/{name}", b"x")
    storage.remove("job/h")
    storage.remove_folder("job/f")
    assert [name for name in storage.names("job") if name != "job/tmp"] == []
    assert not open_again().exists("job/f")
    storage.write("job/f/a", b"again")
    storage.append("job/f/g/log", b"again\n")
    assert open_again().read("job/f/a") == b"again"


def test_an_empty_file(storage):
    storage.write("job/empty", b"")
    assert storage.read("job/empty") == b""
    assert storage.exists("job/empty")


# Locks.


def test_who_has_the_lock_is_named(tmp_path):
    first, second = open_storage(tmp_path), open_storage(tmp_path)
    first.lock()
    with pytest.raises(UsageError, match=r"process \d+ of .* is at work there"):
        second.lock()
    first.close()
    second.lock()
    second.close()
    assert list(tmp_path.iterdir()) == []
    second.close()


def test_a_lock_ends_with_its_process(tmp_path):
    code = (
        "import os, sys; from moe_lightning.jobs import open_storage\n"
        f"open_storage({str(tmp_path)!r}).lock(); print('it', flush=True); os.kill(os.getpid(), 9)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (process.stdout, process.returncode) == (b"it\n", -9)
    assert (tmp_path / "job/lock").exists()
    storage = open_storage(tmp_path)
    storage.lock()
    storage.close()


# URLs.


def test_rows_that_failed_alone_stay_when_the_rank_commits_with_a_storage_of_its_own(open_again):
    """As the callback does: the job notes the failed row in the log of rank 0, and rank 0 goes on
    with the log."""
    plan = JobPlan({}, 3, [np.array([0, 1]), np.array([2])])
    job = Job.open(open_again(), plan)
    job.writer().suspect({2: '{"error": 2}'})
    job.close()
    job = Job.open(open_again(), plan)
    assert job.is_done_N.tolist() == [False, False, True]
    rank_0 = PartWriter(open_again(), job.folder, epoch=job.epoch, rank=0)
    rank_0.commit("0", [(0, True, '{"id": 0}')])
    rank_0.commit("1", [(1, True, '{"id": 1}')])
    assert job.finish(list).num_errors == 1
    job.close()
    assert open_again().read("errors.jsonl") == b'{"error": 2}\n'


def test_a_url_keeps_its_slashes_and_loses_the_last():
    assert UrlStorage("memory://bucket/run///").url == "memory://bucket/run"


def test_a_listing_is_never_an_old_one(tmp_path):
    """Another process adds to a folder that was listed before."""
    for url in (f"memory://{tmp_path.name}/listed", f"file://{tmp_path}/listed"):
        first, second = UrlStorage(url), UrlStorage(url)
        first.write("job/p/a", b"")
        assert first.names("job/p") == ["job/p/a"]
        second.write("job/p/b", b"")
        assert first.names("job/p") == ["job/p/a", "job/p/b"]
        assert first.exists("job/p/b")
