"""What the devices of this machine can do, found by trying: a second or so, and nothing is kept."""

import socket
import threading
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import linear

from moe_lightning.placement.speeds import Rates

TRY_S = 0.2
READ_BYTES = 128 * 2**20
SENT_BYTES = 16 * 2**20
ROWS, WIDTH = 1024, 2048


@torch.inference_mode()
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Try a device, and what connects it with others of this machine.

    Products of many rows with a matrix, a row with a matrix too large for caches, and bytes and
    single bytes from one GPU to another, or through a socket between two threads.

    Args:
        device: A CPU or GPU.
        dtype: Of weights.

    Returns:
        The rates. Nothing is known of a network, nor of a link where there is one GPU.
    """
    rows, square = (torch.ones(n, WIDTH, dtype=dtype, device=device) for n in (ROWS, WIDTH))
    product_s = _best(lambda: linear(rows, square), device)
    large = torch.ones(READ_BYTES // dtype.itemsize // WIDTH, WIDTH, dtype=dtype, device=device)
    read_s = _best(lambda: linear(rows[:1], large), device)
    link, latency_s = _between_threads() if device.type == "cpu" else _between_gpus()
    return Rates(
        flops=2 * ROWS * WIDTH**2 / product_s,
        memory_bytes_per_s=large.nbytes / read_s,
        link_bytes_per_s=link,
        latency_s=latency_s,
    )


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some runs."""
    best_s, until_s = float("inf"), time.perf_counter() + TRY_S
    while best_s == float("inf") or time.perf_counter() < until_s:
        started_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - started_s)
    return max(best_s, 1e-9)


def _between_gpus() -> tuple[float | None, float]:
    if torch.cuda.device_count() < 2:
        return None, 0.0
    source, target = (
        torch.zeros(READ_BYTES, dtype=torch.uint8, device=f"cuda:{n}") for n in (0, 1)
    )
    whole_s = _best(lambda: target.copy_(source), target.device)
    return READ_BYTES / whole_s, _best(lambda: target[:1].copy_(source[:1]), target.device)


def _between_threads() -> tuple[float, float]:
    """Bytes per second through a socket, and half of a byte's way there and back."""
    here, there = socket.socketpair()

    def answer() -> None:
        buffer = bytearray(SENT_BYTES)
        while (size := int.from_bytes(there.recv(4))) > 0:
            _receive(there, memoryview(buffer)[:size])
            there.sendall(b"k")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    payload = bytes(SENT_BYTES)

    def ask(size: int) -> None:
        here.sendall(size.to_bytes(4))
        here.sendall(memoryview(payload)[:size])
        here.recv(1)

    with here, there:
        one_s, all_s = (_best(partial(ask, size), torch.device("cpu")) for size in (1, SENT_BYTES))
        here.sendall(bytes(4))
        thread.join()
    return SENT_BYTES / max(all_s - one_s, 1e-9), one_s / 2


def _receive(connection: socket.socket, buffer: memoryview) -> None:
    while len(buffer):
        buffer = buffer[connection.recv_into(buffer) :]
