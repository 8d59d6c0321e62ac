"""Processes of the command line that start in a moment: forked from one that has imported it all.

    Nursery ── {"arguments", "log", "environ"} ──▶ this file as a process ── fork ──▶ the verb
            ◀── {"pid"}, {"pid", "code", "at_s"} ─┘

Importing torch and what comes with it takes 4 s of CPU. The process that is forked has imported it
and done nothing else: it has one thread, and no sockets. What runs in a child is what
``python -m moe_lightning`` runs, in a session of its own, and it ends as an interpreter does.
"""

import gc
import json
import os
import queue
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

LOOK_S = 0.005
START_S = 120.0
IMPORTED = (
    "moe_lightning.cli.predict",
    "moe_lightning.cli.worker",
    "moe_lightning.demo.random_checkpoint",
    "moe_lightning.strategies.rpc_strategy",
    "moe_lightning.transport.tensorpipe",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "chaos_rpc_master",
)


class Child:
    """A process of the nursery's.

    Attributes:
        pid: Its number.
        log: File with what it says.
        start_s: When it began, by the monotonic clock, as all times here.
        code: Its exit code, negative for a signal; None while it is there.
        end_s: When it ended.
    """

    def __init__(self, log: Path) -> None:
        self.pid = 0
        self.log = log
        self.start_s = time.monotonic()
        self.code: int | None = None
        self.end_s = float("inf")
        self._has_ended = threading.Event()

    @property
    def is_there(self) -> bool:
        """Whether it has not ended."""
        return self.code is None

    def said(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def send(self, number: int) -> None:
        """Send it a signal, if it is there."""
        if self.is_there:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end.

        Args:
            timeout_s: Longest wait.

        Returns:
            Whether it has ended.
        """
        return self._has_ended.wait(timeout_s)

    def end(self) -> None:
        """Make sure that it is gone."""
        self.send(signal.SIGKILL)
        self.wait(START_S)

    def has_ended(self, code: int, at_s: float) -> None:
        """The nursery says so."""
        self.code, self.end_s = code, at_s
        self._has_ended.set()


class Nursery:
    """Starts processes; all of them end with it."""

    def __init__(self) -> None:
        path = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
        environ = os.environ | {
            "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
            # So that nothing but the test's subject decides how long things take.
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ
        )
        self._children: dict[int, Child] = {}
        self._started: queue.Queue[int] = queue.Queue()
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(
        self, arguments: Sequence[object], *, log: Path, environ: Mapping[str, str] | None = None
    ) -> Child:
        """Start ``python -m moe_lightning ARGUMENTS``.

        Args:
            arguments: The command line.
            log: Where what it says is appended.
            environ: More of its environment.

        Returns:
            The process.
        """
        request = {"arguments": [*map(str, arguments)], "log": str(log), "environ": environ or {}}
        child = Child(log)
        with self._lock:
            assert self._process.stdin is not None, "it is a pipe"
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            child.pid = self._started.get(timeout=START_S)
            child.start_s = time.monotonic()
            self._children[child.pid] = child
        return child

    def close(self) -> None:
        """End all that is still there."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None, "it is a pipe"
        for line in self._process.stdout:
            said = json.loads(line)
            if "code" not in said:
                self._started.put(said["pid"])
                continue
            with self._lock:  # whoever starts a child has put it down by then
                child = self._children.pop(said["pid"])
            child.has_ended(said["code"], said["at_s"])


def serve() -> None:
    """Be the process that is forked."""
    for name in IMPORTED:
        import_module(name)
    gc.collect()
    gc.freeze()  # pages that the collector does not touch stay shared
    poller, rest = select.poll(), b""
    poller.register(0, select.POLLIN)
    children: set[int] = set()
    while True:
        if poller.poll(LOOK_S * 1000):
            if not (read := os.read(0, 65536)):
                break
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                if (pid := os.fork()) == 0:
                    become(json.loads(line))
                children.add(pid)
                say({"pid": pid})
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                children.remove(pid)
                code = os.waitstatus_to_exitcode(status)
                say({"pid": pid, "code": code, "at_s": time.monotonic()})
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def become(request: dict[str, Any]) -> None:
    """Be a child; does not return."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environ"])
    # A shell's background jobs begin with Ctrl-C ignored, and so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["moe_lightning", *request["arguments"]]
    # As python -m does it: ranks that this process starts run what is __main__ here.
    runpy.run_module("moe_lightning", run_name="__main__", alter_sys=True)


def say(what: dict[str, Any]) -> None:
    """One line to the nursery."""
    os.write(1, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    serve()
