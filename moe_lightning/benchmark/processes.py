"""A contestant's processes: started, watched, and ended, all of them, whatever happens."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

LOOK_S = 0.1
SMALL_BYTES = 64_000_000  # helpers such as resource trackers are no processes that compute


@dataclass(frozen=True)
class Ran:
    """What one start of a contestant was.

    Attributes:
        started_s: When it was started, on ``time.monotonic``'s clock.
        why_not: What went wrong; empty if nothing did.
        peak_bytes: Most memory that each of its processes had at once, the fullest first.
    """

    started_s: float
    why_not: str
    peak_bytes: tuple[int, ...]


def run_watched(
    command: Sequence[str], log: Path, *, limit_s: float, environment: Mapping[str, str]
) -> Ran:
    """Run a command until it ends, and see how much memory its processes take.

    Args:
        command: The command.
        log: Where its output goes.
        limit_s: Seconds after which it is ended.
        environment: Its environment.

    Returns:
        What there was.
    """
    peaks: dict[int, int] = {}
    with open(log, "wb") as out:
        started_s = time.monotonic()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=dict(environment),
            )
        except OSError as error:
            return Ran(started_s, f"it cannot be started: {error}", ())
        try:
            while process.poll() is None and time.monotonic() - started_s < limit_s:
                _look(process.pid, peaks)
                time.sleep(LOOK_S)
        finally:
            is_late = process.poll() is None
            _end(process)
    why_not = ""
    if is_late:
        why_not = f"not done after {limit_s:.0f} s"
    elif process.returncode:
        why_not = f"exit code {process.returncode}: {_last_words(log)}"
    sizes = sorted((size for size in peaks.values() if size > SMALL_BYTES), reverse=True)
    return Ran(started_s, why_not, tuple(sizes))


def _look(pid: int, peaks: dict[int, int]) -> None:
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            peak = _peak_bytes(process)
        except (psutil.Error, OSError):
            continue
        peaks[process.pid] = max(peaks.get(process.pid, 0), peak)


def _peak_bytes(process: psutil.Process) -> int:
    """What the kernel says was most; where it does not say, what there is now."""
    status = Path("/proc", str(process.pid), "status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return int(process.memory_info().rss)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and whatever it started: ranks and workers are sessions of their own."""
    left: list[psutil.Process] = []
    if process.poll() is None:
        try:
            left = psutil.Process(process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            left = []
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for child in left:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=5)


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    told = [line for line in lines if "Error" in line or "error:" in line]
    return ([*[line for line in lines if line][-1:], *told[-1:]] or ["it said nothing"])[-1][:300]
