"""A contestant's processes are watched, and end."""

import os
import sys
import time

import psutil

from moe_lightning.benchmark.processes import run_watched

MB = 1_000_000
# A process that starts another one, both with memory of their own.
FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "x = b'1' * {child}; import time; time.sleep({s})"],
                         start_new_session=True)
print("child", child.pid, flush=True)
x = b"1" * {own}
child.wait()
"""


def run(program, tmp_path, limit_s=30.0):
    log = tmp_path / "log.txt"
    command = [sys.executable, "-c", program]
    return run_watched(command, log, limit_s=limit_s, environment=os.environ), log


def test_memory_of_all_processes_is_seen(tmp_path):
    ran, _ = run(FAMILY.format(child=200 * MB, own=100 * MB, s=0.6), tmp_path)
    assert not ran.why_not
    child, own = ran.peak_bytes
    assert 200 * MB < child < 230 * MB
    assert 100 * MB < own < 130 * MB


def test_who_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    begin_s = time.monotonic()
    ran, log = run(FAMILY.format(child=MB, own=MB, s=60), tmp_path, limit_s=1.0)
    assert ran.why_not == "not done after 1 s"
    assert time.monotonic() - begin_s < 5
    child = int(log.read_text().split()[1])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


def test_why_it_failed_is_said(tmp_path):
    ran, _ = run("print('begin'); raise ValueError('no such layer')", tmp_path)
    assert ran.why_not == "exit code 1: ValueError: no such layer"
    log = tmp_path / "log.txt"
    ran = run_watched(["/absent/python"], log, limit_s=1.0, environment=os.environ)
    assert "cannot be started" in ran.why_not
    assert "/absent/python" in ran.why_not
    ran, _ = run("import os; os._exit(3)", tmp_path)
    assert ran.why_not == "exit code 3: it said nothing"
