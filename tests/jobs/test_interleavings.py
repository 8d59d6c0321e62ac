"""Runs that take turns at every operation on files, at random."""

from random import Random

import pytest
from simulate_jobs_disk import Process
from simulate_jobs_interleaved import BrokenPromiseError, History, main


def test_a_sample_of_the_schedules(capsys):
    assert main(["--schedules", "300", "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "broken promises                        0" in said
    for what in ("runs: stopped", "runs: refused", "runs: finished", "power cuts", "commits"):
        assert what in said


def test_a_schedule_is_repeated_by_its_seed():
    def happened(seed):
        history = History(Random(seed))
        history.run()
        return history.steps

    assert [happened(seed) for seed in range(100)] == [happened(seed) for seed in range(100)]


def run_all(seeds):
    for seed in seeds:
        History(Random(seed)).run()


def test_a_promise_that_is_broken_would_be_seen(monkeypatch):
    """On a disk that does not sync ledgers, power cuts take what was committed."""

    def sync(self, fd):
        if not self._files[fd].data.startswith(b'{"part"'):
            self._files[fd].sync()

    monkeypatch.setattr(Process, "sync", sync)
    with pytest.raises(BrokenPromiseError):
        run_all(range(1000))
