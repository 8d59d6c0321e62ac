"""A line: one thread's socket to one worker, and what was asked on it.

A line whose connection broke gets a new socket, and what has no answer yet is sent again there.
"""

import struct
import time
from collections.abc import Callable
from weakref import WeakValueDictionary

import zmq

from moe_lightning.transport.messages import MAX_FRAMES
from moe_lightning.transport.sockets import HANDSHAKE_FAILURES, Monitor
from moe_lightning.transport.transport import Frames

EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | HANDSHAKE_FAILURES
)
"""What a line must be told of its connection."""

Dial = Callable[[], tuple["zmq.Socket[bytes]", Monitor]]

_REQUEST = struct.Struct("<16xQ")  # the request's id in the header of any message
_REDIAL_S = 0.1  # shortest time between two sockets
_TROUBLES: dict[int, str] = {
    zmq.EVENT_CONNECTED: "what listens there says nothing, or nothing that a worker would say",
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it refuses this master's key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "what listens there is no worker, or has other keys",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "it closes the connection at once (other keys?)",
}


class Question:
    """What was asked, and the answer once it is there.

    Args:
        request: The request's id.
        frames: The message.
    """

    def __init__(self, request: int, frames: Frames) -> None:
        self.request = request
        self.frames = frames
        self.answer: list[memoryview] | None = None


class Line:
    """Sends questions, takes answers, and mends itself. For one thread at a time.

    Args:
        dial: Makes a connecting socket and its monitor.
    """

    def __init__(self, dial: Dial) -> None:
        self.trouble = "no connection"
        self._dial = dial
        # What nobody waits for any more needs no answer, and is not sent again.
        self._asked: WeakValueDictionary[int, Question] = WeakValueDictionary()
        self._open()

    def ask(self, question: Question) -> None:
        """Send a question.

        Args:
            question: The question.
        """
        if not self._asked:
            self.mend()
        self._asked[question.request] = question
        self._send(question)

    def take(self, wait_s: float) -> bool:
        """Take in a message, and hand it to its question; late and double ones are dropped.

        Args:
            wait_s: Longest wait.

        Returns:
            Whether there was one.
        """
        self._socket.rcvtimeo = round(wait_s * 1000)
        try:
            frames = self._socket.recv_multipart(copy=False)
        except zmq.Again:
            return False
        header = frames[0].buffer
        if len(frames) <= MAX_FRAMES and len(header) >= _REQUEST.size:
            question = self._asked.pop(_REQUEST.unpack_from(header)[0], None)
            if question is not None:
                question.answer = [frame.buffer for frame in frames]
                question.frames = ()
        return True

    def mend(self) -> None:
        """Replace the socket if its connection broke."""
        for event in self._monitor.read():
            if event == zmq.EVENT_DISCONNECTED:
                self._is_cut = True
                self.trouble = self.trouble or "its connection broke"
            else:
                self.trouble = _TROUBLES[event]
        if self._is_cut and time.monotonic() - self._dialled_s >= _REDIAL_S:
            while self.take(0.0):
                pass
            self.close()
            self._open()

    def close(self) -> None:
        """Give up the socket."""
        self._monitor.close()
        self._socket.close(linger=0)

    def _open(self) -> None:
        # libzmq reconnects by itself as long as nobody answers, but it forgets what it had sent,
        # and after a breach of protocol it never tries again.
        self._socket, self._monitor = self._dial()
        self._dialled_s = time.monotonic()
        self._is_cut = False
        for question in list(self._asked.values()):
            self._send(question)

    def _send(self, question: Question) -> None:
        try:
            self._socket.send_multipart(question.frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:  # after a breach of protocol
            self._is_cut = True
