"""Two live runs at a URL, which has no locks: at each request of the first, a second one begins.

The newer run's result stays, but for one case that an object store leaves open: the older run had
looked at the epoch and sends a file in that moment, and the newer one begins and ends before it has
arrived.
"""

import json
from contextlib import suppress

import pytest
from small_job import BATCHES, ERRORS, PREDICTIONS, answer, input_errors

from moe_lightning.errors import MoELightningError, StoppedError
from moe_lightning.jobs import Job, JobPlan, work_units
from moe_lightning.jobs.url_storage import UrlStorage

PLANS = {version: JobPlan({"seed": version}, 7, BATCHES) for version in (1, 2)}


class Requests:
    """A file system that says before each request which one it is."""

    def __init__(self, files, before):
        self.files = files
        self.before = before
        self.log = []

    def __getattr__(self, name):
        def request(*arguments, **options):
            number = len(self.log)
            self.log.append(f"{name} {' '.join(str(a)[-20:] for a in arguments[:2])}")
            self.before(number)
            return getattr(self.files, name)(*arguments, **options)

        return request


def run_job(place, version, before=lambda number: None, **options):
    """A run that does what it can; returns its requests."""
    storage = UrlStorage(place)
    storage._files = requests = Requests(storage._files, before)
    with suppress(MoELightningError, OSError):
        job = Job.open(storage, PLANS[version], **options)
        try:
            for unit in work_units(BATCHES, is_done_N=job.is_done_N):
                rows = [answer(row) for row in unit.rows]
                if version == 2:
                    rows = [(row, True, json.dumps({"other": row})) for row, _, _ in rows]
                job.writer().commit(f"{unit.number:08d}", rows)
            job.finish(input_errors)
        finally:
            job.close()
    return requests.log


def result(place):
    storage = UrlStorage(place)
    return storage.read("predictions.jsonl"), storage.read("errors.jsonl")


def is_finished(place):
    storage = UrlStorage(place)
    marker, plan = storage.read("_SUCCESS"), storage.read("job/plan.json")
    return None not in (marker, plan) and json.loads(marker)["job"] == json.loads(plan)["id"]


OTHER = (
    b"".join(b'{"other": %d}\n' % n for n in (0, 1, 2, 3, 4, 6)),
    b'{"bad": 5}\n',
)


@pytest.fixture
def places(tmp_path):
    return (f"memory://{tmp_path.name}/{k}" for k in range(1000))


def test_a_newer_run_of_the_same_job_gives_the_same_files(places):
    place = next(places)
    num_requests = len(run_job(place, 1))
    assert result(place) == (PREDICTIONS, ERRORS)
    for k, place in zip(range(num_requests), places, strict=False):

        def newer(number, k=k, place=place):
            if number == k:
                run_job(place, 1)

        run_job(place, 1, newer)
        run_job(place, 1)
        assert result(place) == (PREDICTIONS, ERRORS)
        assert is_finished(place)


def test_a_run_that_another_job_replaced_changes_nothing_but_what_is_on_its_way(places):
    place = next(places)
    log = run_job(place, 1)
    is_planned = next(k for k, what in enumerate(log) if "plan.json" in what and "put_file" in what)
    changed = set()
    for k, place in zip(range(is_planned + 1, len(log)), places, strict=False):

        def newer(number, k=k, place=place):
            if number == k:
                run_job(place, 2, restart=True)
                assert result(place) == OTHER
                assert is_finished(place)

        requests = run_job(place, 1, newer)
        if result(place) != OTHER or not is_finished(place):
            changed.add(requests[k])
    allowed = {what for what in log if what.startswith("put_file ") and "/job/" not in what}
    print(sorted(changed))
    assert {what.split()[0] for what in changed} <= {"put_file", "makedirs"}
    assert len(changed) <= 2 * len(allowed)


@pytest.mark.parametrize("name", ["predictions.jsonl", "errors.jsonl", "_SUCCESS"])
def test_a_run_that_was_replaced_while_it_wrote_a_file_does_not_send_it(places, name):
    """The newer one begins and ends when the older one's file is begun, which takes long."""
    place = next(places)
    num_begun = 0

    class Slow(UrlStorage):
        def writer(self, name_):
            nonlocal num_begun
            if name_ == name:
                num_begun += 1
                run_job(place, 2, restart=True)
            return super().writer(name_)

    job = Job.open(Slow(place), PLANS[1])
    for unit in work_units(BATCHES):
        job.writer().commit(f"{unit.number:08d}", [answer(row) for row in unit.rows])
    if name == "_SUCCESS":  # the last look was just before
        job.finish(input_errors)
    else:
        # Its parts are gone, or it sees that it was replaced.
        with pytest.raises((StoppedError, FileNotFoundError)):
            job.finish(input_errors)
        assert is_finished(place)
    assert num_begun == 1
    assert result(place) == OTHER
