"""Worker processes that a master starts on its own machine, and that end with it."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moe_lightning.errors import WorkersLostError
from moe_lightning.workers.local_processes import LocalWorkers
from moe_lightning.workers.worker import WorkerOptions

LONG_ENOUGH_S = 40
PARENT = """
import sys, time
from moe_lightning.workers.local_processes import LocalWorkers
from moe_lightning.workers.worker import WorkerOptions
workers = LocalWorkers(1, WorkerOptions(sys.argv[1], threads=1))
print(workers.processes[0].pid, flush=True)
time.sleep(60)
"""


def test_processes_that_serve_and_leave(checkpoint, meet):
    """The one test here that waits for a start."""
    workers = LocalWorkers(1, WorkerOptions(str(checkpoint), threads=1))
    try:
        directory = Path(workers.addresses[0].removeprefix("ipc://")).parent
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700, "nobody else may enter"
        (process,) = workers.processes
        assert os.getsid(process.pid) != os.getsid(0), "Ctrl-C is for the master"
        roster = meet(workers.addresses, join_timeout_s=LONG_ENOUGH_S)
        assert roster.offers[0]["pid"] == process.pid
        workers.check()
        process.send_signal(signal.SIGSTOP)
        start_s = time.monotonic()
    finally:
        workers.close()
    assert time.monotonic() - start_s < 5, "one that does not listen any more is killed"
    assert process.poll() == -signal.SIGKILL
    assert not directory.exists()
    workers.close()  # twice does no harm


def test_they_end_at_once_while_they_are_still_starting(checkpoint):
    workers = LocalWorkers(2, WorkerOptions(str(checkpoint), threads=1))
    start_s = time.monotonic()
    workers.close()
    assert time.monotonic() - start_s < 5
    assert all(process.poll() is not None for process in workers.processes)


def test_one_that_ends_before_it_serves_is_told_with_its_last_words(tmp_path):
    workers = LocalWorkers(1, WorkerOptions(str(tmp_path / "nowhere"), threads=1))
    try:
        workers.processes[0].wait(LONG_ENOUGH_S)
        with pytest.raises(WorkersLostError) as error:
            workers.check()
    finally:
        workers.close()
    assert "the local worker 0 ended with exit code 4" in str(error.value)
    assert "nowhere" in str(error.value)


def test_a_killed_master_leaves_no_orphans(checkpoint):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(checkpoint)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        orphan = psutil.Process(int(parent.stdout.readline()))
    finally:
        parent.kill()
        parent.wait()
    # Still starting: it finds its pipe closed as soon as it looks.
    orphan.wait(LONG_ENOUGH_S)
