"""The worker that fuzz_worker.py throws at: a real ZmqServer and a real pulse, in a process.

It refuses what the parser refuses and sends back what is a message. It ends when its stdin does,
and then writes to stdout what reached its handler.
"""

import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

from moe_lightning.transport.keys import Keys
from moe_lightning.transport.messages import MalformedMessage, parse
from moe_lightning.transport.pulse import PulseServer
from moe_lightning.transport.zmq_server import ZmqServer

SESSION = 7

Handler = Callable[[list[memoryview]], list[memoryview] | None]


class Target:
    """What a handler does, and how often; the others than `refuses` are wrong, to be found out."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._kept: list[bytes] = []

    def refuses(self, frames: list[memoryview]) -> list[memoryview] | None:
        try:
            parse(frames)
        except MalformedMessage:
            self.counts["refused"] += 1
            return None
        self.counts["read"] += 1
        return frames

    def dies(self, frames: list[memoryview]) -> list[memoryview] | None:
        answer = self.refuses(frames)
        if answer is None:
            os._exit(3)
        return answer

    def hangs(self, frames: list[memoryview]) -> list[memoryview] | None:
        answer = self.refuses(frames)
        if answer is None:
            time.sleep(60)
        return answer

    def keeps(self, frames: list[memoryview]) -> list[memoryview] | None:
        answer = self.refuses(frames)
        if answer is None:
            self._kept.append(os.urandom(2**22))
        return answer

    def mixes(self, frames: list[memoryview]) -> list[memoryview] | None:
        """One in a hundred answers has a wrong byte."""
        answer = self.refuses(frames)
        if answer is not None and self.counts["read"] % 100 == 0:
            answer[-1] = memoryview(bytes(answer[-1])[:-1] + b"?")
        return answer


def main(handler: str, keys_directory: str = "") -> None:
    logging.basicConfig(level=logging.INFO)
    keys = Keys.load(keys_directory, "worker") if keys_directory else None
    target = Target()
    server = ZmqServer("tcp://127.0.0.1:0", keys=keys)
    pulse = PulseServer("tcp://127.0.0.1:0", keys=keys)
    pulse.session = SESSION
    print(json.dumps({"requests": server.address, "pulse": pulse.address}), flush=True)
    is_over = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        is_over.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    server.serve(getattr(target, handler), lambda: not is_over.is_set())
    server.close()
    pulse.close()
    print(json.dumps(target.counts), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
