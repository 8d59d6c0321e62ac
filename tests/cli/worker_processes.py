"""Processes of the command line: hand-started workers, and whatever torchrun starts."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress

import psutil

LONG_ENOUGH_S = 120  # this machine may be busy with others
ENVIRON = os.environ | {"OMP_NUM_THREADS": "1"}


class Worker:
    """``python -m moe_lightning worker`` as a process."""

    def __init__(self, *options):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "moe_lightning", "worker", *map(str, options)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=ENVIRON
        )

    def said(self):
        self.log.seek(0)
        return self.log.read()

    def address(self):
        """Where it listens, once it does."""
        deadline_s = time.monotonic() + LONG_ENOUGH_S
        while time.monotonic() < deadline_s and self.process.poll() is None:
            if found := re.search(r"^listening on (\S+), offering .+\n", self.said(), re.MULTILINE):
                return found[1]
            time.sleep(0.1)
        raise AssertionError(f"the worker does not listen: {self.said()}")

    def end(self, number=signal.SIGTERM):
        """Tell it to leave; its exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(10)
        finally:
            self.process.kill()


@contextmanager
def workers(*options_of_each):
    """So many workers, all starting at once."""
    started = [Worker(*options) for options in options_of_each]
    try:
        yield started
    finally:
        for worker in started:
            worker.process.kill()
            worker.process.wait()


def run_to_its_end(*command, **environ):
    """Run a command, with more variables in its environment."""
    return subprocess.run(
        list(map(str, command)),
        env=ENVIRON | environ,
        capture_output=True,
        text=True,
        timeout=LONG_ENOUGH_S,
    )


def finish(*command):
    """Run a Python command to its end."""
    return run_to_its_end(sys.executable, *command)


def torchrun(num_processes, *command):
    """Run a command under torchrun on this machine."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", num_processes)
    return finish(*launcher, *command)


def free_port():
    """A port that is free, as the one after it is.

    Not of those that the kernel gives to outgoing connections, which come and go.
    """
    while True:
        port = random.randrange(12_000, 30_000)
        with socket.socket() as probe, socket.socket() as next_one, suppress(OSError):
            probe.bind(("", port))
            next_one.bind(("", port + 1))
            return port


def outside_address():
    """An IPv4 address of this machine that others could reach; None if it has none."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return address.address
    return None
