"""Worker processes that a master starts on its own machine, and that end with it."""

import os
import signal
import stat
import sys
import time
from pathlib import Path

import psutil
import pytest

from moe_lightning.errors import WorkersLostError
from moe_lightning.workers.local_processes import LocalWorkers
from moe_lightning.workers.worker import WorkerOptions

LONG_ENOUGH_S = 40


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Have workers run a shell script in place of Python, whose start takes seconds."""

    def program(*lines):
        script = tmp_path / "script"
        script.write_text("\n".join(("#!/bin/sh", *lines)))
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return program


def start(num_workers, checkpoint="demo"):
    return LocalWorkers([WorkerOptions(str(checkpoint), threads=1)] * num_workers)


def directory_of(workers):
    return Path(workers.addresses[0].removeprefix("ipc://")).parent


def test_a_real_one_serves_and_leaves(checkpoint, meet):
    workers = start(1, checkpoint)
    (process,) = workers.processes
    try:
        assert os.getsid(process.pid) != os.getsid(0), "Ctrl-C is for the master"
        roster = meet(workers.addresses, join_timeout_s=LONG_ENOUGH_S)
        assert roster.offers[0]["pid"] == process.pid
        workers.check()
    finally:
        workers.close()
    assert process.poll() == 0
    assert not directory_of(workers).exists()


def test_nobody_else_may_enter_where_they_listen(program):
    program("cat")
    workers = start(3)
    assert stat.S_IMODE(directory_of(workers).stat().st_mode) == 0o700
    assert len({*workers.addresses}) == 3
    assert {Path(a.removeprefix("ipc://")).parent for a in workers.addresses} == {
        directory_of(workers)
    }
    workers.close()


def test_they_are_told_how_to_serve(program):
    program('echo "$@"')
    workers = LocalWorkers([WorkerOptions("some dir", threads=3, device="cuda:1")])
    workers.processes[0].wait(LONG_ENOUGH_S)
    with pytest.raises(WorkersLostError) as error:
        workers.check()
    workers.close()
    assert (
        f"-m moe_lightning worker --model.checkpoint some dir --listen {workers.addresses[0]} "
        "--device cuda:1 --threads 3 --parent_pipe true"
    ) in str(error.value)


def test_closing_ends_their_standard_input_and_is_quick(program):
    program("cat", "exit 3")
    workers = start(3)
    workers.check()
    start_s = time.monotonic()
    workers.close()
    assert time.monotonic() - start_s < 2
    assert [process.poll() for process in workers.processes] == [3] * 3
    assert not directory_of(workers).exists()
    workers.close()  # twice does no harm


@pytest.mark.parametrize("is_stopped", [False, True])
def test_one_that_does_not_leave_is_killed(is_stopped, program):
    program("trap '' TERM INT HUP", "exec sleep 60 <&-")
    workers = start(2)
    if is_stopped:
        workers.processes[1].send_signal(signal.SIGSTOP)
    start_s = time.monotonic()
    workers.close()
    assert time.monotonic() - start_s < 8
    assert [process.poll() for process in workers.processes] == [-signal.SIGKILL] * 2


def test_one_that_ends_before_it_serves_is_told_with_its_last_words(program):
    program("echo some words", "echo the checkpoint is broken >&2", "exit 4")
    workers = start(1)
    try:
        workers.processes[0].wait(LONG_ENOUGH_S)
        with pytest.raises(WorkersLostError) as error:
            workers.check()
    finally:
        workers.close()
    assert "the local worker 0 ended with exit code 4" in str(error.value)
    assert "the checkpoint is broken" in str(error.value)


def test_one_that_says_nothing(program):
    program("kill -9 $$")
    workers = start(2)
    workers.processes[1].wait(LONG_ENOUGH_S)
    workers.processes[0].wait(LONG_ENOUGH_S)
    with pytest.raises(WorkersLostError, match=r"ended with exit code -9.*it said nothing"):
        workers.check()
    workers.close()


def test_a_killed_master_leaves_no_orphans(program):
    """Each has a pipe of its own to the master: nobody else must hold its other end open."""
    program("cat")
    read_end, write_end = os.pipe()
    master = os.fork()
    if master == 0:  # a copy of this process, for nothing but to start them and be killed
        try:
            workers = start(3)
            pids = " ".join(str(process.pid) for process in workers.processes)
            os.write(write_end, pids.encode())
            time.sleep(LONG_ENOUGH_S)
        finally:
            os._exit(1)
    orphans = [psutil.Process(int(pid)) for pid in os.read(read_end, 1000).split()]
    os.close(read_end)
    os.close(write_end)
    assert len(orphans) == 3
    os.kill(master, signal.SIGKILL)
    os.waitpid(master, 0)
    for orphan in orphans:
        orphan.wait(LONG_ENOUGH_S)
