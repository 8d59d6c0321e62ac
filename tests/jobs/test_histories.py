"""Random histories of runs that commit, crash, lose power, come back from the dead, and finish."""

from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from job_history import STEPS, BrokenPromiseError, History
from simulate_jobs import main

from moe_lightning.jobs import part_writer


class Histories(RuleBasedStateMachine):
    """Hypothesis chooses the steps, and makes a history that breaks a promise short."""

    history: History

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed):
        self.history = History(Random(seed))

    @rule(step=st.sampled_from(sorted(set(STEPS))))
    def step(self, step):
        self.history.step(step)

    @invariant()
    def holds(self):
        self.history.check()

    def teardown(self):
        if hasattr(self, "history"):
            self.history.run(num_steps=0)


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_a_sample_of_the_schedules(capsys):
    assert main(["--schedules", "600", "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "broken promises                        0" in said
    assert "zombies' commits refused" in said


def test_a_promise_that_is_broken_would_be_seen(monkeypatch):
    """Without the check of the epoch, zombies commit."""
    monkeypatch.setattr(part_writer.PartWriter, "check_epoch", lambda self: None)
    with pytest.raises(BrokenPromiseError, match="zombie"):
        run_all(range(200))


def run_all(seeds):
    for seed in seeds:
        History(Random(seed)).run(num_steps=40)
