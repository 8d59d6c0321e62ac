"""A process that can be the worker or the master of a tensorpipe session, told by lines of JSON.

As a module it starts such processes and talks to them; as a script it is one.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil


class TensorPipeProcess:
    """The process, as its parent sees it. Its log is the parent's."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._talking = threading.Lock()

    def order(self, verb, **options):
        """Have it do something, see `_Served`, without waiting."""
        self.process.stdin.write(json.dumps({"verb": verb} | options) + "\n")
        self.process.stdin.flush()

    def reply(self):
        """Wait for the result; an exception there is a RuntimeError here."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"process {self.process.pid} is gone")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["result"]

    def tell(self, verb, **options):
        with self._talking:
            self.order(verb, **options)
            return self.reply()

    def join(self, body, **options):
        return self.tell("join", body=body, **options)

    def open(self, worker, host="127.0.0.1"):
        """Have it open a session with a worker process."""
        self.order("open", host=host)
        worker.join(self.reply(), host=host)
        self.order("joined")
        self.reply()

    def signal(self, number):
        self.process.send_signal(number)

    def listening(self):
        return listening(self.process.pid)

    def end(self):
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                pipe.close()


def listening(pid):
    """Sorted addresses, without ports, on which a process listens."""
    return sorted(
        connection.laddr.ip
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    )


class _Served:
    """What the process can be told to do."""

    def __init__(self):
        self.endpoint = None
        self.transport = None

    def handle(self, frames):
        """Echo, after the seconds that a first frame `sleep` has in the second one."""
        if bytes(frames[0]) == b"sleep":
            time.sleep(float(bytes(frames[1])))
        return frames

    def join(self, body, host="127.0.0.1", timeout_s=20):
        from moe_lightning.transport.tensorpipe_server import join_tensorpipe

        self.endpoint = join_tensorpipe(body, self.handle, host=host, timeout_s=timeout_s)

    def open(self, host, timeout_s=20):
        """As a master: replies with the body of "join" and, after the verb `joined`, when open."""
        from moe_lightning.transport.tensorpipe import TensorPipeTransport

        def join(_, body):
            print(json.dumps({"result": body}), flush=True)
            sys.stdin.readline()

        self.transport = TensorPipeTransport.open(
            host,
            ["the worker"],
            join=join,
            lost=lambda _: None,
            give_up=lambda _, reason: None,
            timeout_s=timeout_s,
        )

    def ask(self, text, num_bytes):
        """As a master: ask the worker, and wait for nothing."""
        self.transport.ask(0, 1, [*map(str.encode, text.split()), bytearray(num_bytes)])

    def close(self):
        (self.endpoint or self.transport).close()


def main():
    served = _Served()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": getattr(served, request.pop("verb"))(**request)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
