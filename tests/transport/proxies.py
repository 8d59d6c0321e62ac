"""A TCP proxy in threads, for connections that go wrong."""

import socket
import threading
import time
from contextlib import suppress

_CHUNK = 65536


class TcpProxy:
    """Passes the bytes of connections on, until told otherwise.

    Args:
        target: Host and port that it connects to.
        cuts: For each of the first connections, the direction ("up" to the target, "down" from it)
            and the number of bytes after which it is cut, both ways and without a word.
    """

    def __init__(self, target, cuts=()):
        self._target = target
        self._cuts = list(cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.num_connections = 0
        self.num_passed = {"up": 0, "down": 0}
        self.delay_s = 0.0
        # Cleared: bytes of that direction are held back, and the connection stays.
        self.is_open = {"up": threading.Event(), "down": threading.Event()}
        for event in self.is_open.values():
            event.set()
        self._sockets = []
        self._is_closed = False
        self._start(self._accept)

    @property
    def address(self):
        return f"tcp://127.0.0.1:{self.port}"

    def cut_all(self):
        """Cut the connections that are there now."""
        for each in list(self._sockets):
            _cut(each)

    def close(self):
        self._is_closed = True
        self._listener.close()
        for event in self.is_open.values():
            event.set()
        self.cut_all()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                if self._is_closed:
                    return
                _cut(near)
                continue
            cut = self._cuts.pop(0) if self._cuts else None
            self.num_connections += 1
            self._sockets += [near, far]
            if self._is_closed:
                self.cut_all()
            self._start(self._pass_on, near, far, "up", cut)
            self._start(self._pass_on, far, near, "down", cut)

    def _pass_on(self, source, sink, direction, cut):
        left = cut[1] if cut is not None and cut[0] == direction else None
        with suppress(OSError):
            while left != 0:
                data = source.recv(_CHUNK if left is None else min(left, _CHUNK))
                if not data:
                    break
                if self.delay_s:
                    time.sleep(self.delay_s)
                self.is_open[direction].wait()
                sink.sendall(data)
                self.num_passed[direction] += len(data)
                left = None if left is None else left - len(data)
        _cut(source)
        _cut(sink)

    def _start(self, function, *args):
        threading.Thread(target=function, args=args, daemon=True).start()


def _cut(connection):
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
