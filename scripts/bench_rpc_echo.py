"""Raw TCP: as many bytes there and back as bench_rpc.py is told, and nothing else.

python bench_rpc_echo.py worker '{"address": [HOST, PORT]}'
python bench_rpc_echo.py master '{"addresses": [[HOST, PORT], ...]}'
"""

import json
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from bench_rpc_player import Turn, play, seconds_of

SIZES = struct.Struct("<QQ")
MOST_BYTES = 1 << 28
PATIENCE_S = 60.0


def serve(options: Mapping[str, Any]) -> None:
    """Give back as many bytes as is asked for, after as many as is said."""
    with socket.create_server(tuple(options["address"])) as server:
        connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(MOST_BYTES))
    while header := connection.recv(SIZES.size, socket.MSG_WAITALL):
        num_in, num_out = SIZES.unpack(header)
        _receive(connection, buffer[:num_in])
        connection.sendall(buffer[:num_out])


def ask(options: Mapping[str, Any]) -> tuple[dict[str, Any], Turn]:
    """Send all, then receive all; a turn names the bytes there and back for each worker."""
    sockets = [_connect(tuple(address)) for address in options["addresses"]]
    buffer = memoryview(bytearray(MOST_BYTES))

    def exchange(amounts: Sequence[tuple[int, int]]) -> None:
        for connection, (num_there, num_back) in zip(sockets, amounts, strict=True):
            connection.sendall(SIZES.pack(num_there, num_back))
            connection.sendall(buffer[:num_there])
        for connection, (_, num_back) in zip(sockets, amounts, strict=True):
            _receive(connection, buffer[:num_back])

    return {}, lambda question: {"seconds": seconds_of(partial(exchange, question["amounts"]))}


def _connect(address: tuple[str, int]) -> socket.socket:
    end_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            connection = socket.create_connection(address, timeout=PATIENCE_S)
        except OSError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.1)
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


def _receive(connection: socket.socket, into: memoryview) -> None:
    while into:
        num_bytes = connection.recv_into(into)
        if not num_bytes:
            raise ConnectionError("the other end has closed")
        into = into[num_bytes:]


if __name__ == "__main__":
    role, given = sys.argv[1], json.loads(sys.argv[2])
    if role == "worker":
        serve(given)
    else:
        play(partial(ask, given))
