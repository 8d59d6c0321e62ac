"""A relay between a master and a worker, which may change answers on their way."""

import struct
import tempfile
import threading
from pathlib import Path

import zmq

from moe_lightning.transport.messages import Kind

_HEAD = struct.Struct("<4sBBHQQ")  # magic, protocol, kind, zero, session, request


def is_sums(frames):
    """Whether a message carries sums."""
    return _HEAD.unpack_from(frames[0])[2] == Kind.SUMS


class Relay:
    """Listens where the master asks, and asks the worker.

    Args:
        worker: The worker's address. Its pulse is not relayed.
        change: What becomes of an answer: gets its frames, gives a list of messages.
    """

    def __init__(self, worker, change):
        self._directory = tempfile.TemporaryDirectory(prefix="moe-")
        self.address = f"ipc://{Path(self._directory.name)}/r"
        self._change = change
        self._context = zmq.Context()
        self._front, self._back = self._context.socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        self._front.bind(self.address)
        self._back.connect(worker)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self):
        self._is_over.set()
        self._thread.join()
        self._context.destroy(linger=0)
        self._directory.cleanup()

    def _serve(self):
        poller, askers = zmq.Poller(), {}
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._back, zmq.POLLIN)
        while not self._is_over.is_set():
            for socket, _ in poller.poll(20):
                if socket is self._front:
                    asker, *frames = self._front.recv_multipart()
                    askers[_HEAD.unpack_from(frames[0])[5]] = asker
                    self._back.send_multipart(frames)
                else:
                    frames = self._back.recv_multipart()
                    asker = askers[_HEAD.unpack_from(frames[0])[5]]
                    for changed in self._change(frames):
                        self._front.send_multipart([asker, *changed])
