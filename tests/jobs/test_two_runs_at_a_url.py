"""Two live runs at a URL, which has no locks: at each request of the first, a second one begins.

The newer run's result stays, but for one case that an object store leaves open: the older run had
looked at the epoch and sends a file in that moment, and the newer one begins and ends before it has
arrived.
"""

import json
from contextlib import contextmanager, suppress

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
        is_marker_sent = "_SUCCESS" in "".join(requests[k : k + 2])
        assert is_finished(place) or is_marker_sent, requests[k]
        if result(place) != OTHER or not is_finished(place):
            changed.add(requests[k])
    # The folder is made just before a file is sent.
    assert {what.split()[0] for what in changed} <= {"put_file", "makedirs"}
    assert len(changed) <= 6


class Slow(UrlStorage):
    """Something happens when so many pieces of a file have been written."""

    def __init__(self, url, name, num_pieces, happens):
        super().__init__(url)
        self.name, self.num_pieces, self.happens = name, num_pieces, happens

    @contextmanager
    def writer(self, name):
        with super().writer(name) as file:
            yield Counting(file, self) if name == self.name else file


class Counting:
    def __init__(self, file, storage):
        self.file = file
        self.storage = storage

    def write(self, data):
        self.file.write(data)
        self.storage.num_pieces -= 1
        if self.storage.num_pieces == 0:
            self.storage.happens()


@pytest.mark.parametrize(("name", "num_pieces"), [("predictions.jsonl", 5), ("errors.jsonl", 2)])
def test_a_run_that_was_replaced_while_it_wrote_a_file_does_not_send_it(places, name, num_pieces):
    """The newer one begins and ends when the older one's file is written, but not sent."""
    place = next(places)
    happened = []

    def newer():
        run_job(place, 2, restart=True)
        happened.append(result(place))

    job = Job.open(Slow(place, name, num_pieces, newer), PLANS[1])
    for unit in work_units(BATCHES):
        job.writer().commit(f"{unit.number:08d}", [answer(row) for row in unit.rows])
    with pytest.raises(StoppedError, match="another run"):
        job.finish(input_errors)
    job.close()
    assert happened == [OTHER]
    assert result(place) == OTHER
    assert is_finished(place)
