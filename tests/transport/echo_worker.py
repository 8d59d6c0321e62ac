"""A worker without a model: what it does with a request is a function of this module, by name.

As a script, `echo_worker.py TRANSPORT HANDLER ADDRESS [KEYS]`, it is that worker: it writes its
addresses as JSON to stdout, its log to stderr, and ends when its stdin does, so that no test leaves
one behind. With TRANSPORT `tensorpipe`, the lines of its stdin are bodies of "join".
"""

import json
import logging
import struct
import sys
import threading
import time
from collections import Counter

from moe_lightning.transport.addresses import pulse_address
from moe_lightning.transport.keys import Keys
from moe_lightning.transport.pulse import PulseServer
from moe_lightning.transport.zmq_server import ZmqServer

SESSION = 7
MAX_FRAME_BYTES = 40 * 2**20

_HEADER = struct.Struct("<4sBBHQQ")
_num_seen = Counter()
_num_inside = 0
_inside_lock = threading.Lock()


def header(request):
    """The part of a header that all messages have."""
    return _HEADER.pack(b"MoEL", 1, 5, 0, SESSION, request)


def echo(frames):
    return frames


def sleep(frames):
    """The second frame says for how many seconds."""
    if len(frames) > 1:
        time.sleep(float(bytes(frames[1])))
    return frames


def compute(frames):
    """Busy for as long as the second frame says, in operations of some 100 ms each."""
    import torch

    end_s = time.monotonic() + float(bytes(frames[1]))
    matrix = torch.randn(1500, 1500)
    while time.monotonic() < end_s:
        matrix @ matrix
    return frames


def refuse(frames):
    """Drops or fails if the second frame says so."""
    what = bytes(frames[1]) if len(frames) > 1 else b""
    if what == b"fail":
        raise RuntimeError("this request fails")
    return None if what == b"drop" else frames


def count(frames):
    """How often a request with these frames has come."""
    key = b"".join(frames)
    _num_seen[key] += 1
    return [frames[0], str(_num_seen[key]).encode()]


def count_inside(frames):
    """How many requests are being handled, this one included."""
    global _num_inside
    with _inside_lock:
        _num_inside += 1
    time.sleep(0.01)
    inside = _num_inside
    with _inside_lock:
        _num_inside -= 1
    return [frames[0], str(inside).encode()]


def _serve_zmq(handle, address, keys):
    server = ZmqServer(address, keys=keys, max_frame_bytes=MAX_FRAME_BYTES)
    is_over = threading.Event()

    def wait_for_end():
        sys.stdin.read()
        is_over.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    _tell(server.address, address, keys)
    server.serve(handle, lambda: not is_over.is_set())
    server.close()


def _serve_tensorpipe(handle, address, keys):
    from moe_lightning.transport.tensorpipe_server import join_tensorpipe

    _tell(address, address, keys)
    endpoint = None
    for line in sys.stdin:
        endpoint = join_tensorpipe(json.loads(line), handle, timeout_s=30)
        print("{}", flush=True)
    if endpoint is not None:
        endpoint.close()


def _tell(address, wanted_address, keys):
    pulse = PulseServer(pulse_address(wanted_address), keys=keys)
    pulse.session = SESSION
    print(json.dumps({"address": address, "pulse": pulse.address}), flush=True)


def main(transport, handler, address, *keys_dir):
    logging.basicConfig(level=logging.WARNING)
    handle = {each.__name__: each for each in (echo, sleep, compute, refuse, count, count_inside)}
    keys = Keys.load(keys_dir[0], "worker") if keys_dir else None
    serve = {"zmq": _serve_zmq, "tensorpipe": _serve_tensorpipe}[transport]
    serve(handle[handler], address, keys)


if __name__ == "__main__":
    main(*sys.argv[1:])
