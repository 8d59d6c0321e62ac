"""chaos_job_processes.py: nothing is found or sent a signal that does not carry the token."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SLEEP = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "scripts")


@pytest.fixture
def sleeper():
    """Start a process with a token, or without any."""
    started = []

    def start(token=None):
        environ = dict(os.environ) | ({} if token is None else {"CHAOS_JOB_RUN": token})
        process = subprocess.Popen(SLEEP, env=environ, stdout=subprocess.PIPE)
        started.append(process)
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_only_those_with_the_token_are_found(sleeper):
    from chaos_job_processes import new_token, processes_of

    token = new_token()
    assert processes_of(token) == {}
    own, _, _ = sleeper(token), sleeper(new_token()), sleeper()
    assert list(processes_of(token)) == [own.pid]


def test_only_those_with_the_token_are_ended(sleeper):
    from chaos_job_processes import end_all, new_token, send

    token = new_token()
    own, other, plain = sleeper(token), sleeper(new_token()), sleeper()
    assert not send(other.pid, token, signal.SIGKILL)
    assert not send(plain.pid, token, signal.SIGKILL)
    end_all(token)
    assert own.wait(10) == -signal.SIGKILL
    assert other.poll() is None
    assert plain.poll() is None


@pytest.mark.parametrize("token", ["", "1", "0-"])
def test_a_token_that_others_could_carry_is_refused(token):
    from chaos_job_processes import end_all

    with pytest.raises(AssertionError, match="by chance"):
        end_all(token)
