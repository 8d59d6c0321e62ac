"""Ranks of tests/strategies/test_rank_watch.py, which sum with each other until something happens.

As a module it starts a process that has imported everything; as a script it is that process, which
forks a rank for each line of JSON, says its process id, and writes its exit code beside its log. A
rank ends as an interpreter does.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moe_lightning.errors import MoELightningError
from moe_lightning.strategies.rank_watch import RankWatch, WatchTimes


class ForkedRanks:
    """The process that forks ranks, as its parent sees it."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def fork(self, log, **options):
        """Start a rank that writes to a log; its process id."""
        self._process.stdin.write(json.dumps({"log": str(log), **options}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self):
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def main():
    codes = {}
    while True:
        if select.select([sys.stdin], [], [], 0.05)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            options = json.loads(line)
            pid = os.fork()
            if pid == 0:
                be_rank(**options)
                return
            codes[pid] = Path(options["log"]).with_suffix(".code")
            print(pid, flush=True)
        for pid in list(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                part = codes[pid].with_suffix(".part")
                part.write_text(str(os.waitstatus_to_exitcode(status)))
                part.rename(codes.pop(pid))


def be_rank(log, rank, size, port, timeout_s, how=None):
    """Be a rank, to which something happens at its 20th sum."""
    os.close(0)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timeout)
    times = WatchTimes(timeout_s, warn_s=2, answer_s=2, grace_s=3)
    watch = RankWatch.start(dist.group.WORLD, times)
    print("up", flush=True)
    try:
        for step in range(10**6):
            if step == 20 and how == "fails":
                raise ZeroDivisionError("no such\nnumber")
            if step == 20 and how == "hangs":
                threading.Event().wait()  # as on a GPU, where no exception ever comes
            if step == 20 and how == "is done":
                break
            dist.all_reduce(torch.ones(8))
            time.sleep(0.01)
        watch.stop()
    except BaseException as error:
        cause = watch.explain(error, what_failed="summing")
        watch.stop()
        if isinstance(cause, MoELightningError):
            print(f"error: {cause}", flush=True)
            sys.exit(cause.exit_code)
        if isinstance(cause or error, KeyboardInterrupt):
            print("interrupted", flush=True)
            sys.exit(5)
        raise


if __name__ == "__main__":
    main()
