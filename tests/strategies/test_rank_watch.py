"""Ranks that die while the others sum with them: real processes, killed and stopped for real."""

import os
import re
import signal
import socket
import time
from itertools import product
from pathlib import Path

import pytest
from sampling import sampled
from watched_rank import ForkedRanks

TIMEOUT_S = 4
BOUND_S = 20  # the group's timeout, the diagnosis, and an interpreter that ends


class Ranks:
    """Some ranks of watched_rank.py, as processes.

    Args:
        forked: What forks them.
        directory: For their logs.
        num_ranks: How many.
        how: What befalls which rank by itself.
    """

    def __init__(self, forked, directory, num_ranks, how):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.logs = [Path(directory, f"{rank}.log") for rank in range(num_ranks)]
        self.pids = [
            forked.fork(
                log, rank=rank, size=num_ranks, port=port, timeout_s=TIMEOUT_S, how=how.get(rank)
            )
            for rank, log in enumerate(self.logs)
        ]
        self._wait(lambda: all(log.exists() and "up" in log.read_text() for log in self.logs))

    def signal(self, rank, number):
        os.kill(self.pids[rank], number)

    def end(self, ranks):
        """(exit code, output) of these ranks, which must end in time."""
        codes = [self.logs[rank].with_suffix(".code") for rank in ranks]
        self._wait(lambda: all(code.exists() for code in codes))
        return [(int(code.read_text()), code.with_suffix(".log").read_text()) for code in codes]

    def is_running(self):
        return [not log.with_suffix(".code").exists() for log in self.logs]

    def close(self):
        for rank, is_running in enumerate(self.is_running()):
            if is_running:
                self.signal(rank, signal.SIGKILL)

    def _wait(self, until):
        end_s = time.monotonic() + BOUND_S
        while not until():
            assert time.monotonic() < end_s, [log.read_text() for log in self.logs if log.exists()]
            time.sleep(0.05)


@pytest.fixture(scope="module")
def forked():
    process = ForkedRanks()
    yield process
    process.close()


@pytest.fixture
def start(forked, tmp_path):
    started = []

    def start(num_ranks, how=None):
        ranks = Ranks(forked, tmp_path, num_ranks, how or {})
        started.append(ranks)
        time.sleep(0.3)  # some sums
        return ranks

    yield start
    for ranks in started:
        ranks.close()


def named(output):
    """The ranks that an error names, with a host and process each."""
    (error,) = [line for line in output.splitlines() if "error: " in line]
    host = re.escape(socket.gethostname())
    return [int(rank) for rank in re.findall(rf"rank (\d+) on host {host} \(process \d+\)", error)]


@pytest.mark.parametrize(
    ("number", "victim"),
    sampled(
        list(product([signal.SIGKILL, signal.SIGSTOP], [0, 1])),
        (signal.SIGKILL, 0),
        (signal.SIGSTOP, 1),
    ),
)
def test_the_others_end_with_6_and_name_the_rank_that_was_killed_or_stopped(start, victim, number):
    ranks = start(3)
    ranks.signal(victim, number)
    for code, output in ranks.end([r for r in range(3) if r != victim]):
        assert code == 6, output
        assert named(output) == [victim], output
        assert "The same command continues" in output
        assert "terminate called" not in output


@pytest.mark.wide
def test_two_ranks_that_died_together_are_both_named(start):
    ranks = start(4)
    ranks.signal(1, signal.SIGKILL)
    ranks.signal(2, signal.SIGKILL)
    for code, output in ranks.end([0, 3]):
        assert code == 6, output
        assert named(output) == [1, 2], output


@pytest.mark.wide
def test_a_rank_that_is_stopped_and_goes_on_too_late_learns_that_it_was_given_up(start):
    ranks = start(3)
    ranks.signal(1, signal.SIGSTOP)
    ranks.end([0, 2])
    ranks.signal(1, signal.SIGCONT)
    ((code, output),) = ranks.end([1])
    assert code == 6, output
    assert named(output) == [1], output
    assert "gave rank 1" in output
    assert "this one, up" in output


def test_a_rank_that_fails_is_named_with_its_error_by_the_others(start):
    ranks = start(3, how={2: "fails"})
    (code, output), *others = ranks.end([2, 0, 1])
    assert code == 1, output
    assert "Traceback" in output
    for code, output in others:
        assert code == 6, output
        assert named(output) == [2], output
        assert "ZeroDivisionError: no such number" in output


@pytest.mark.wide
def test_ranks_whose_peer_was_interrupted_are_interrupted(start):
    ranks = start(2)
    ranks.signal(1, signal.SIGINT)
    for code, output in ranks.end([0, 1]):
        assert code == 5, output
        assert "interrupted" in output.splitlines()[-1]


def test_sigterm_of_the_survivors_is_not_mistaken_for_the_cause(start):
    ranks = start(3)
    ranks.signal(1, signal.SIGKILL)
    for rank in (0, 2):
        ranks.signal(rank, signal.SIGINT)  # as the one that SIGTERM raises in the command line
    for code, output in ranks.end([0, 2]):
        assert code == 6, output
        assert named(output) == [1], output


@pytest.mark.wide
def test_a_thread_that_never_comes_back_is_ended_with_6_too(start):
    ranks = start(2, how={0: "hangs"})
    time.sleep(1)
    ranks.signal(1, signal.SIGKILL)
    ((code, output),) = ranks.end([0])
    assert code == 6, output
    assert named(output) == [1], output
    assert "has been silent for 2 s; after 4 s the run ends" in output


def test_a_rank_that_is_stopped_for_a_while_costs_nothing_but_a_line(start):
    ranks = start(2)
    ranks.signal(1, signal.SIGSTOP)
    time.sleep(3)
    ranks.signal(1, signal.SIGCONT)
    time.sleep(2)
    assert ranks.is_running() == [True, True]
    ranks.signal(0, signal.SIGINT)
    (_, output), _ = ranks.end([0, 1])
    assert re.search(r"rank 1 on host .* has been silent for 2 s", output), output
    assert re.search(r"rank 1 on host .* answers again", output), output


def test_ranks_that_are_done_leave_without_a_word(start):
    ranks = start(3, how=dict.fromkeys(range(3), "is done"))
    for code, output in ranks.end(range(3)):
        assert (code, output) == (0, "up\n")
