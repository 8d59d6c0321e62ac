"""A job in a directory and at a URL: begun, continued, refused, finished, retried."""

import json
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from moe_lightning.errors import StoppedError, UsageError
from moe_lightning.jobs import Job, JobPlan, Outcome, open_storage, work_units
from moe_lightning.jobs.parts import Parts

PLAN = JobPlan({"task": {"name": "Score"}}, 6, [np.array([4, 0]), np.array([3, 1, 2])])
BAD = [(5, '{"bad": 5}')]


@pytest.fixture(params=["directory", "file", "memory"])
def place(request, tmp_path):
    """A local directory, the same as a URL, and an object store."""
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        return "memory://bucket/run"
    return f"file://{tmp_path}/run" if request.param == "file" else str(tmp_path / "run")


@pytest.fixture
def open_job(place):
    jobs = []

    def open_job(plan=PLAN, **options):
        while jobs:
            jobs.pop().close()
        jobs.append(Job.open(open_storage(place), plan, **options))
        return jobs[-1]

    yield open_job
    while jobs:
        jobs.pop().close()


def row(number, is_ok=True, **fields):
    return number, is_ok, json.dumps({"id": number, **fields})


def commit_all(job, *, failed=()):
    for unit in work_units(PLAN.batches, is_done_N=job.is_done_N):
        rows = [row(int(n), n not in failed) for n in unit.rows]
        job.writer().commit(f"{unit.number:08d}", rows)


def read(place, name):
    data = open_storage(place).read(name)
    return None if data is None else data.decode()


def test_a_job_from_beginning_to_end(open_job, place):
    job = open_job()
    assert (job.epoch, job.num_done, job.is_finished) == (1, 0, False)
    commit_all(job)
    assert job.finish(lambda: BAD) == Outcome(6, 5, 1)
    wanted = "".join(f'{{"id": {n}}}\n' for n in range(5))
    assert read(place, "predictions.jsonl") == wanted
    assert read(place, "errors.jsonl") == '{"bad": 5}\n'
    assert json.loads(read(place, "_SUCCESS"))["counts"]["num_predictions"] == 5
    assert job.finish(lambda: BAD) == Outcome(6, 5, 1)
    again = open_job()
    assert again.is_finished
    assert again.outcome == Outcome(6, 5, 1)
    assert open_storage(place).names(again.folder) == []


def test_what_is_committed_is_done(open_job, place):
    job = open_job()
    job.writer(rank=3).commit("a", [row(3), row(0, False)])
    job = open_job()
    assert (job.epoch, job.num_done, job.num_failed) == (2, 2, 1)
    assert job.is_done_N.tolist() == [True, False, False, True, False, False]
    with pytest.raises(StoppedError, match="6 rows in, but 3 rows in predictions and errors"):
        job.finish(lambda: BAD)
    assert read(place, "_SUCCESS") is None


def test_a_part_without_a_line_is_removed(open_job, place):
    job = open_job()
    job.storage.write(f"{job.folder}/parts/000001-x.part", b'0\tok\t{"id": "lost"}\n')
    job.writer().commit("a", [row(3)])
    job = open_job()
    assert job.num_done == 1
    assert [n.rpartition("/")[2] for n in job.storage.names(f"{job.folder}/parts")] == [
        "000001-a.part"
    ]


@pytest.mark.parametrize("damage", [b"", b'3\tok\t{"id": 4}\n', None])
def test_a_damaged_part_is_computed_again(open_job, place, damage):
    job = open_job()
    entry = job.writer().commit("a", [row(3)])
    if damage is None:
        job.storage.remove(entry.part)
    else:
        job.storage.write(entry.part, damage)
    with pytest.raises(StoppedError, match=r"1 parts of job/.* were changed or removed"):
        job.finish(lambda: BAD)
    job = open_job()
    assert (job.num_damaged, job.num_done) == (1, 0)
    commit_all(job)
    assert job.finish(lambda: BAD) == Outcome(6, 5, 1)


def test_errors_are_retried_and_an_answer_beats_an_error(open_job, place):
    job = open_job()
    commit_all(job, failed=(1, 4))
    assert job.finish(lambda: BAD) == Outcome(6, 3, 3)
    assert open_job().is_finished
    job = open_job(retry_errors=True)
    assert not job.is_finished
    assert np.flatnonzero(~job.is_done_N).tolist() == [1, 4, 5]
    job.writer().commit("again", [row(1, text="at last"), row(4, False, text="no")])
    assert job.finish(lambda: BAD) == Outcome(6, 4, 2)
    assert '{"id": 1, "text": "at last"}' in read(place, "predictions.jsonl")
    assert read(place, "errors.jsonl") == '{"id": 4, "text": "no"}\n{"bad": 5}\n'


def test_nothing_to_retry(open_job):
    job = open_job()
    commit_all(job)
    job.finish(lambda: BAD)
    assert open_job(retry_errors=True).is_finished


def test_another_job_is_refused_unless_it_is_to_be_forgotten(open_job, place):
    other = JobPlan({"task": {"name": "Embed"}}, 6, PLAN.batches)
    job = open_job()
    job.writer().commit("a", [row(3)])
    with pytest.raises(UsageError, match=r'task.name: "Score", now "Embed"'):
        open_job(other)
    other_batches = JobPlan(PLAN.identity, 6, PLAN.batches[::-1])
    with pytest.raises(UsageError, match="the planned batches are others"):
        open_job(other_batches)
    assert open_job().num_done == 1
    job = open_job(other, restart=True)
    assert (job.epoch, job.num_done) == (1, 0)
    assert len(job.storage.names("job")) <= 3  # the plan, the job, and the lock of a directory


def test_a_job_in_which_nothing_is_done_is_replaced(open_job):
    open_job()
    assert open_job(JobPlan({"task": {"name": "Embed"}}, 6, PLAN.batches)).epoch == 1


def test_a_result_that_was_taken_away_is_made_again(open_job, place):
    job = open_job()
    commit_all(job)
    job.finish(lambda: BAD)
    open_storage(place).remove("predictions.jsonl")
    job = open_job()
    assert (job.is_finished, job.num_done) == (False, 0)


def test_a_limited_run_stays_open(open_job, place):
    job = open_job()
    job.writer().commit("a", [row(4), row(0)])
    assert job.finish(lambda: BAD, is_limited=True) == Outcome(3, 2, 1)
    assert read(place, "_SUCCESS") is None
    assert len(read(place, "predictions.jsonl").splitlines()) == 2
    job = open_job()
    commit_all(job)
    assert job.finish(lambda: BAD) == Outcome(6, 5, 1)


def test_a_run_whose_rows_are_not_known_always_begins_anew(open_job, place):
    for _ in range(2):
        job = open_job(JobPlan())
        job.writer().commit("a", [row(1), row(0)])
        assert job.finish(list) == Outcome(2, 2, 0)
    assert len(read(place, "predictions.jsonl").splitlines()) == 2


def test_a_run_that_was_taken_over_from_stops(open_job, place):
    job = open_job()
    zombie = job.writer()
    open_job()
    with pytest.raises(StoppedError, match="another run of this job has begun"):
        zombie.commit("late", [row(0)])


def test_rows_that_ended_a_run_are_alone_then_out(open_job):
    job = open_job()
    job.writer().suspect({1: "e1", 2: "e2"})
    job = open_job()
    assert job.suspects == {1, 2}
    assert job.num_done == 0
    job.writer().suspect({2: '{"id": 2}'})
    job = open_job()
    assert (job.num_done, job.num_failed) == (1, 1)
    assert job.is_done_N[2]


def test_any_text_survives(open_job, place):
    texts = ["\u2028 \u2029 \x85 \r \x0b \x1c", '"\\', "\ud7ff", "é" * 3, "\t\t", ""]
    job = open_job(JobPlan({}, 6, [np.arange(6)]))
    job.writer().commit(
        "a",
        [(n, True, json.dumps({"t": text}, ensure_ascii=False)) for n, text in enumerate(texts)],
    )
    job.finish(list)
    lines = read(place, "predictions.jsonl").split("\n")[:-1]
    assert [json.loads(line)["t"] for line in lines] == texts


@pytest.mark.parametrize(("ids", "wanted"), [([3, 1], [3, 1]), (["a", 7], ["a", "7"]), ([], [])])
def test_parquet(open_job, place, tmp_path, ids, wanted):
    job = open_job(JobPlan({}, len(ids), [np.arange(len(ids))]))
    job.writer().commit("a", [(n, True, json.dumps({"id": id})) for n, id in enumerate(ids)])
    job.finish(list, "parquet")
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(open_storage(place).read("predictions.parquet"))
    assert pq.read_table(copy)["id"].to_pylist() == wanted


def test_more_parts_than_files_may_be_open(tmp_path):
    job = Job.open(open_storage(tmp_path), JobPlan({}, 200, [np.arange(200)]))
    entries = [job.writer().commit(f"{n}", [row(n)]) for n in range(200)]
    parts = Parts(job.storage)
    parts.extend(entries)
    assert [json.loads(parts.read(n))["id"] for n in (199, 0, 100, 199)] == [199, 0, 100, 199]
    assert len(parts._open) <= 64
    parts.close()
    job.close()


def test_two_processes(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from moe_lightning.jobs import open_storage\n"
            f"open_storage({str(tmp_path)!r}).lock(); print('it', flush=True); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"it\n"
        with pytest.raises(UsageError, match=f"process {holder.pid} of .* is at work there"):
            Job.open(open_storage(tmp_path), PLAN)
    finally:
        holder.kill()
        holder.wait()
    job = Job.open(open_storage(tmp_path), PLAN)
    job.close()
    assert not Path(tmp_path, "job").exists()


def test_jobs_need_no_torch():
    code = "import sys, moe_lightning.jobs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_protocol_that_nobody_knows():
    with pytest.raises(UsageError, match="nosuch"):
        open_storage("nosuch://bucket/run")
