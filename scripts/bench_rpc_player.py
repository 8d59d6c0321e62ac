"""Processes that bench_rpc.py asks to measure something, one turn at a time.

bench_rpc.py ── {"do": ..., ...} ──▶ stdin  ┌────────┐
             ◀────── {...} ──────── stdout  │ player │      one JSON object a line
                                            └────────┘
"""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

START_S = 180.0  # until a player has loaded its model
TURN_S = 120.0
PATIENCE_S = 5.0

Turn = Callable[[dict[str, Any]], dict[str, Any]]
"""Answers a question."""


class PlayerFailedError(RuntimeError):
    """A player that ended, raised, or did not answer; with what it said on stderr."""


class Process:
    """A process of the benchmark, whose stderr is kept.

    Args:
        argv: Its command line.
        name: For messages.
    """

    def __init__(self, argv: Sequence[str], *, name: str) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def read_line(self, timeout_s: float) -> str:
        """A line that it wrote.

        Args:
            timeout_s: Longest wait.

        Returns:
            The line.

        Raises:
            PlayerFailedError: If there is none.
        """
        out = self.process.stdout
        assert out is not None, "it was opened as a pipe"
        readable, _, _ = select.select([out], [], [], timeout_s)
        line = out.readline() if readable else ""
        if not line:
            what = "ended" if readable else f"said nothing for {timeout_s:g} s"
            raise PlayerFailedError(f"{self.name} {what}: {self.stderr()[-3000:]}")
        return line

    def stderr(self) -> str:
        """What it has written on stderr."""
        self._log.seek(0)
        return self._log.read().strip()

    def close(self) -> None:
        """End it: kindly, then not."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


class Player(Process):
    """A process that answers questions (see :func:`play`). It says when it is ready."""

    def wait_until_ready(self) -> dict[str, Any]:
        """What it has to say once it is ready."""
        return self._answer(START_S)

    def ask(self, timeout_s: float = TURN_S, **question: Any) -> dict[str, Any]:
        """Ask a question and wait for the answer."""
        assert self.process.stdin is not None, "it was opened as a pipe"
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PlayerFailedError(f"{self.name} ended: {self.stderr()[-3000:]}") from None
        return self._answer(timeout_s)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.read_line(timeout_s))
        if "error" in answer:
            raise PlayerFailedError(f"{self.name}: {answer['error']}")
        return answer


def play(start: Callable[[], tuple[dict[str, Any], Turn]]) -> None:
    """Be a player: start, then answer questions until stdin ends.

    Args:
        start: Gets ready; returns what is to be said then, and what answers questions.
    """
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        ready, answer = start()
        say(ready)
        for line in sys.stdin:
            say(answer(json.loads(line)))
    except Exception:
        say({"error": traceback.format_exc()})
        sys.exit(1)


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s
