"""Workers in threads of the test's process: real sockets and messages without the starts."""

import tempfile
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from moe_lightning.workers.worker import WorkerOptions, serve_experts

LONG_ENOUGH_S = 30


@contextmanager
def _worker(checkpoint, **options):
    is_over, is_listening = threading.Event(), threading.Event()
    addresses, failures = [], []

    def listening(address):
        addresses.append(address)
        is_listening.set()

    def serve():
        try:
            serve_experts(
                WorkerOptions(str(checkpoint), threads=1, **options),
                on_listening=listening,
                is_wanted=lambda: not is_over.is_set(),
            )
        except BaseException as error:
            failures.append(error)
            is_listening.set()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert is_listening.wait(LONG_ENOUGH_S)
    if failures:
        raise failures[0]
    try:
        yield addresses[0]
    finally:
        is_over.set()
        thread.join(LONG_ENOUGH_S)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def worker_threads():
    """Addresses of so many workers of a checkpoint: ``worker_threads(path, 3, **options)``; they
    wait for master after master, for the whole session."""
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="moe-") as directory:
        kept = {}

        def start(checkpoint, num_workers, **options):
            addresses = kept.setdefault((str(checkpoint), repr(sorted(options.items()))), [])
            while len(addresses) < num_workers:
                listen = f"ipc://{Path(directory)}/{len(kept)}-{len(addresses)}"
                addresses.append(
                    stack.enter_context(_worker(checkpoint, **{"listen": listen} | options))
                )
            return addresses[:num_workers]

        yield start
