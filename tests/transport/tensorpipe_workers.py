"""A worker of the tensorpipe transport as a process, controlled by lines over its pipes.

As a module it starts such processes; as a script it is one. The first frame of a request says what
to do with it: ``raise``, ``drop``, ``sleep`` (for the seconds in the second frame), else echo.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from typing_extensions import Buffer


class TensorPipeWorker:
    """The process, as its parent sees it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._talking = threading.Lock()
        self.complaints: list[str] = []
        # Read all the time: a full pipe would stop the worker.
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.complaints.append(line)

    def tell(self, **request: Any) -> Any:
        """Send a request and wait for its result; an exception there is a RuntimeError here."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self._talking:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker process {self.process.pid} is gone")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["result"]

    def join(self, body: dict[str, object], timeout_s: float = 20) -> None:
        self.tell(verb="join", body=body, timeout_s=timeout_s)

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


class _Worker:
    """The process, as it sees itself."""

    def __init__(self) -> None:
        self.endpoint: Any = None
        self.num_handled = 0
        self.num_in_handler = 0
        self.most_in_handler = 0

    def handle(self, frames: list[memoryview]) -> Sequence[Buffer] | None:
        self.num_in_handler += 1
        self.most_in_handler = max(self.most_in_handler, self.num_in_handler)
        try:
            word = bytes(frames[0]) if frames else b""
            if word == b"raise":
                raise ValueError("the handler fails: prøve 日本")
            if word == b"sleep":
                time.sleep(float(bytes(frames[1])))
            self.num_handled += 1
            return None if word == b"drop" else frames
        finally:
            self.num_in_handler -= 1

    def join(self, body: dict[str, object], timeout_s: float, host: str = "127.0.0.1") -> None:
        from moe_lightning.transport.tensorpipe_server import join_tensorpipe

        self.endpoint = join_tensorpipe(body, self.handle, host=host, timeout_s=timeout_s)

    def close(self) -> None:
        self.endpoint.close()

    def counts(self) -> dict[str, int]:
        return {
            "handled": self.num_handled,
            "most_in_handler": self.most_in_handler,
            "threads": len(os.listdir("/proc/self/task")),
        }

    def main(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                reply = {"result": getattr(self, request.pop("verb"))(**request)}
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _Worker().main()
