"""Many worker processes from one start of Python, whose imports take seconds: forks of a process
that has imported everything and done nothing.

As a module it starts that process; as a script it is it. A line of JSON on its standard input forks
a worker with these options, whose process id is the answer; all end with it.
"""

import json
import os
import signal
import subprocess
import sys


class ForkedWorkers:
    """The process, as its parent sees it.

    Args:
        directory: Where workers listen.
    """

    def __init__(self, directory):
        self._directory = directory
        self._pids = []
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(self, checkpoint, **options):
        """Start a worker; its address."""
        address = f"ipc://{self._directory}/{len(self._pids)}"
        options = {"checkpoint": str(checkpoint), "listen": address, "threads": 1} | options
        self._process.stdin.write(json.dumps(options) + "\n")
        self._process.stdin.flush()
        self._pids.append(int(self._process.stdout.readline()))
        return address

    def kill(self, address):
        """Kill the worker of an address."""
        os.kill(self._pids[int(address.rpartition("/")[2])], signal.SIGKILL)

    def close(self):
        """End all of them."""
        self._process.stdin.close()
        self._process.wait()


def main():
    from moe_lightning.workers.worker import WorkerOptions, serve_experts

    pids = []
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that are killed
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                serve_experts(WorkerOptions(**json.loads(line)))
            finally:
                os._exit(0)
        pids.append(pid)
        print(pid, flush=True)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
