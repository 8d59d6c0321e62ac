"""Measures a link with plain TCP: round trips, and what one stream carries each way and both ways.

python link_probe.py serve 10.77.0.2             # at one end
python link_probe.py measure 10.77.0.2 --seconds 2     # at the other; prints JSON
"""

import argparse
import json
import socket
import statistics
import sys
import threading
import time

Address = tuple[str, int]
PINGS = 100
WARM_UP_S = 0.5  # of a stream: until its windows are open
PIECE = bytes(1 << 20)
PATIENCE_S = 30.0


def serve(address: Address) -> None:
    """Answer probes until killed."""
    with socket.create_server(address) as server:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kind = connection.recv(1)
        if not kind:  # somebody looked whether we are here
            return
        seconds = float(connection.recv(8, socket.MSG_WAITALL))
        if kind == b"p":
            while byte := connection.recv(1):
                connection.sendall(byte)
        elif kind == b"s":
            _send(connection, seconds)
        else:
            connection.sendall(f"{_received_per_s(connection):.0f}".encode())


def _ask(address: Address, kind: bytes, seconds: float) -> socket.socket:
    connection = socket.create_connection(address, timeout=PATIENCE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(kind)
    connection.sendall(f"{seconds:<8.3f}".encode())
    return connection


def _send(connection: socket.socket, seconds: float) -> None:
    end_s = time.monotonic() + seconds + WARM_UP_S
    while time.monotonic() < end_s:
        connection.sendall(PIECE)
    connection.shutdown(socket.SHUT_WR)


def _received_per_s(connection: socket.socket) -> float:
    """Bytes per second after the warm-up."""
    buffer = bytearray(len(PIECE))
    start_s = time.monotonic() + WARM_UP_S
    first_s = last_s = 0.0
    num_bytes = 0
    while got := connection.recv_into(buffer):
        last_s = time.monotonic()
        if first_s:
            num_bytes += got
        elif last_s >= start_s:
            first_s = last_s
    return num_bytes / (last_s - first_s)


def round_trips_ms(address: Address) -> list[float]:
    """Round trips of single bytes over one connection."""
    with _ask(address, b"p", 0.0) as connection:
        times_s = []
        for _ in range(PINGS):
            start_s = time.perf_counter()
            connection.sendall(b"x")
            connection.recv(1)
            times_s.append(time.perf_counter() - start_s)
    return [1e3 * each_s for each_s in times_s]


def sent_per_s(address: Address, seconds: float) -> float:
    """Bytes per second of one stream to the other end."""
    with _ask(address, b"r", seconds) as connection:
        _send(connection, seconds)
        return float(connection.recv(64))


def fetched_per_s(address: Address, seconds: float) -> float:
    """Bytes per second of one stream from the other end."""
    with _ask(address, b"s", seconds) as connection:
        return _received_per_s(connection)


def both_per_s(address: Address, seconds: float) -> tuple[float, float]:
    """Bytes per second of one stream each way at once."""
    fetched: list[float] = []
    other = threading.Thread(target=lambda: fetched.append(fetched_per_s(address, seconds)))
    other.start()
    sent = sent_per_s(address, seconds)
    other.join()
    return sent, fetched[0]


def measure(address: Address, seconds: float) -> dict[str, float]:
    """All of it: milliseconds and gigabits per second."""
    trips_ms = round_trips_ms(address)
    rates = {
        "there": sent_per_s(address, seconds),
        "back": fetched_per_s(address, seconds),
    }
    rates["there_of_both"], rates["back_of_both"] = both_per_s(address, seconds)
    return {
        "round_trip_ms": statistics.median(trips_ms),
        "round_trip_p95_ms": statistics.quantiles(trips_ms, n=20)[-1],
        **{f"{name}_gbit": 8e-9 * rate for name, rate in rates.items()},
    }


def wait_for_server(address: Address) -> None:
    """Wait until the other end is there."""
    end_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection(address, timeout=PATIENCE_S).close()
        except ConnectionRefusedError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.05)
        else:
            return


def main() -> None:
    """One of the two ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, default=7777)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    address = (options.address, options.port)
    if options.serve:
        serve(address)
    else:
        wait_for_server(address)
        json.dump(measure(address, options.seconds), sys.stdout)


if __name__ == "__main__":
    main()
