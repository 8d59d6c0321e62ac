"""Worker processes of this machine, started and ended by the master.

They listen on Unix sockets in a directory that only this user can enter.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from moe_lightning.errors import WorkersLostError
from moe_lightning.workers.worker import WorkerOptions

PATIENCE_S = 0.5  # they have nothing to lose, and whoever pressed Ctrl-C waits


class LocalWorkers:
    """Worker processes that end with this process, whatever ends it.

    Args:
        workers: How each of them serves; the addresses are chosen here.
    """

    def __init__(self, workers: Sequence[WorkerOptions]) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="moe-"))
        self.addresses = [f"ipc://{self._directory}/{n}" for n in range(len(workers))]
        self.processes: list[subprocess.Popen[bytes]] = []
        for number, (options, address) in enumerate(zip(workers, self.addresses, strict=True)):
            arguments = replace(options, listen=address, parent_pipe=True).to_arguments()
            # A session of its own: Ctrl-C is for the master, which ends its workers itself.
            with (self._directory / f"{number}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.processes.append(process)

    def check(self) -> None:
        """See whether all are there.

        Raises:
            WorkersLostError: If one has ended; with what it said last.
        """
        for number, process in enumerate(self.processes):
            if process.poll() is not None:
                said = (self._directory / f"{number}.log").read_text(errors="replace").strip()
                raise WorkersLostError(
                    f"the local worker {number} ended with exit code {process.returncode} before "
                    f"it served: {said[-2000:] or 'it said nothing'}"
                )

    def close(self) -> None:
        """End them: they leave by themselves once their standard input ends."""
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()
        deadline_s = time.monotonic() + PATIENCE_S
        try:
            for process in self.processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline_s - time.monotonic()))
        finally:  # also at the second Ctrl-C
            for process in self.processes:
                process.kill()
                process.wait()
            shutil.rmtree(self._directory, ignore_errors=True)
