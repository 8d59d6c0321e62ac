"""Workers in threads of the test's process: real sockets and messages without the starts."""

import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_lightning.workers.worker import WorkerOptions, serve_experts

LONG_ENOUGH_S = 30


class ThreadWorker:
    """A worker that serves in a thread.

    Args:
        checkpoint: Its copy of the checkpoint.
        **options: More options of the worker.

    Attributes:
        address: Where it listens.
        exit_code: What it left with, once it has.
    """

    def __init__(self, checkpoint, **options):
        self.exit_code = None
        self._failure = None
        self._is_over, self._is_listening = threading.Event(), threading.Event()
        options = {"threads": 1} | options
        self._thread = threading.Thread(
            target=self._serve, args=(WorkerOptions(str(checkpoint), **options),), daemon=True
        )
        self._thread.start()
        assert self._is_listening.wait(LONG_ENOUGH_S)
        if self._failure is not None:
            raise self._failure

    def _serve(self, options):
        try:
            self.exit_code = serve_experts(
                options,
                on_listening=self._listens,
                is_wanted=lambda: not self._is_over.is_set(),
            )
        except BaseException as error:
            self._failure = error
            self._is_listening.set()

    def _listens(self, address):
        self.address = address
        self._is_listening.set()

    def wait(self):
        """Wait until it has left by itself; its exit code."""
        self._thread.join(LONG_ENOUGH_S)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure
        return self.exit_code

    def tell_to_leave(self):
        """It does, within a fraction of a second."""
        self._is_over.set()

    def end(self):
        """Have it leave; its exit code."""
        self.tell_to_leave()
        return self.wait()


@contextmanager
def thread_worker(checkpoint, **options):
    """A worker for the block; on a Unix socket unless an address is given."""
    with tempfile.TemporaryDirectory(prefix="moe-") as directory:
        worker = ThreadWorker(checkpoint, **{"listen": f"ipc://{Path(directory)}/w"} | options)
        try:
            yield worker
        finally:
            worker.end()


class WorkerPool:
    """Workers in threads, by checkpoint and options, that serve master after master."""

    def __init__(self, directory):
        self._directory = directory
        self._workers = {}

    def __call__(self, checkpoint, num_workers, **options):
        """Addresses of so many workers; with the same options the same ones each time."""
        workers = self._workers.setdefault((str(checkpoint), repr(sorted(options.items()))), [])
        while len(workers) < num_workers:
            number = sum(map(len, self._workers.values()))
            listen = f"ipc://{self._directory}/{number}"
            workers.append(ThreadWorker(checkpoint, **{"listen": listen} | options))
        return [worker.address for worker in workers[:num_workers]]

    def close(self):
        """End all of them."""
        workers = [worker for some in self._workers.values() for worker in some]
        for worker in workers:
            worker.tell_to_leave()
        for worker in workers:
            worker.wait()


@contextmanager
def worker_pool():
    """A pool for the block."""
    with tempfile.TemporaryDirectory(prefix="moe-") as directory:
        pool = WorkerPool(directory)
        try:
            yield pool
        finally:
            pool.close()


@pytest.fixture(scope="module")
def worker_threads():
    """Addresses of so many workers of a checkpoint: ``worker_threads(path, 3, **options)``; they
    wait for master after master, until the module's tests are done."""
    with worker_pool() as pool:
        yield pool
