"""bench_rpc.py --layer: one layer's rows to two workers and back, with nothing computed there.

    one message for each worker ┐
    a call for each expert      ├─ over zmq and TensorPipe ─▶ 2 workers that give the rows back
    raw TCP echo                ┘  of as many bytes as one message for each worker has

Every contestant is a process with workers of its own; they take turns.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench_placement_clock import Times, progress, race
from bench_rpc_places import Place
from bench_rpc_player import Player, Process

SCRIPTS = Path(__file__).parent
ONE_MESSAGE, ECHO = "one message, zmq", "raw TCP echo"
OURS = {
    ONE_MESSAGE: ("zmq", "message"),
    "one message, tensorpipe": ("tensorpipe", "message"),
    "zmq call per expert": ("zmq", "calls"),
}
GUIDE = {
    "TensorPipe call per expert": ("guide", "at once"),
    "... one by one": ("guide", "one by one"),
    "TensorPipe call per expert, shared memory": ("shared memory", "at once"),
    "... one by one, shared memory": ("shared memory", "one by one"),
}


@dataclass(frozen=True)
class LayerSizes:
    """What is sent.

    Attributes:
        tokens: Rows.
        num_experts: Experts of the layer.
        top_k: Experts of a row.
        width: Numbers of a row, float32.
        num_workers: Workers; each has a block of the experts.
    """

    tokens: int = 256
    num_experts: int = 64
    top_k: int = 8
    width: int = 2048
    num_workers: int = 2


@dataclass(frozen=True)
class LayerRow:
    """One contestant.

    Attributes:
        name: What it is.
        times: Times of the layer.
        bytes_there: Bytes that leave the master; None where they are not counted.
        bytes_back: Bytes that come back.
        parts_ms: Where the master's time goes, of our own dispatchers.
    """

    name: str
    times: Times
    bytes_there: int | None = None
    bytes_back: int | None = None
    parts_ms: dict[str, float] | None = None


@dataclass(frozen=True)
class LayerReport:
    """All contestants at one place."""

    place: str
    rows: list[LayerRow]

    def row(self, name: str) -> LayerRow:
        """One of them."""
        return next(row for row in self.rows if row.name == name)


def measure_layer(
    place: Place, sizes: LayerSizes, *, seconds: float, seed: int, has_tensorpipe: bool = True
) -> LayerReport:
    """Compare the ways of asking about one layer.

    Args:
        place: Where master and workers are.
        sizes: What is sent.
        seconds: How long.
        seed: Seed of the rows.
        has_tensorpipe: Whether torch.distributed.rpc takes part.

    Returns:
        The comparison.
    """
    with ExitStack() as stack:
        masters = _start(place, sizes, stack=stack, seed=seed, has_tensorpipe=has_tensorpipe)
        for master in masters.values():
            master.wait_until_ready()
        ours = {n: how for n, how in OURS.items() if how[0] in masters}

        def tell() -> dict[str, Any]:
            return {
                name: _tell(masters[transport].ask(do="tell", how=how), sizes.num_workers)
                for name, (transport, how) in ours.items()
            }

        amounts, _ = tell()[ONE_MESSAGE]
        turns = {
            name: partial(_seconds, masters[transport], do="time", how=how)
            for name, (transport, how) in ours.items()
        }
        turns |= {
            name: partial(_seconds, masters[kind], how=how)
            for name, (kind, how) in GUIDE.items()
            if kind in masters
        }
        turns[ECHO] = partial(_seconds, masters["echo"], amounts=amounts)
        progress(f"layer, {place.name}: everybody is ready")
        race(turns, seconds=0.0, title="warm-up")
        times = race(turns, seconds=seconds, title=f"layer, {place.name}")
        told = tell()  # of a warm run
    rows = []
    for name, times_s in times.items():
        counted, parts_ms = told.get(name, (amounts if name == ECHO else None, None))
        there, back = [sum(each) for each in zip(*counted, strict=True)] if counted else [None] * 2
        rows.append(LayerRow(name, Times.of(times_s), there, back, parts_ms))
    return LayerReport(place.name, rows)


def _seconds(master: Player, **question: Any) -> float:
    return float(master.ask(**question)["seconds"])


def _tell(
    answer: Mapping[str, Any], num_workers: int
) -> tuple[list[tuple[int, int]], dict[str, float]]:
    """Bytes there and back for each worker, and milliseconds of each part."""
    there, back = [0] * num_workers, [0] * num_workers
    parts_ms: dict[str, float] = defaultdict(float)
    for part, slot, seconds, num_bytes in answer["spans"]:
        parts_ms[part] += 1e3 * seconds
        if part == "dispatch":
            there[slot] += num_bytes
        elif part == "combine":
            back[slot] += num_bytes
    return list(zip(there, back, strict=True)), dict(parts_ms)


def _start(
    place: Place, sizes: LayerSizes, *, stack: ExitStack, seed: int, has_tensorpipe: bool
) -> dict[str, Player]:
    """Start everybody; nobody is waited for."""
    masters = {}
    numbers = asdict(sizes) | {"seed": seed, "interface": place.interface}
    scripts = {"zmq": "mirror", "echo": "echo"}
    if has_tensorpipe:
        scripts |= {"tensorpipe": "mirror", "guide": "guide"}
        if place.link is None:
            scripts["shared memory"] = "guide"
    for kind, script in scripts.items():
        addresses = [(place.worker_host, place.free_port()) for _ in range(sizes.num_workers)]
        keys = None if kind != "zmq" or place.keys is None else str(place.keys)
        master = numbers | {
            "addresses": addresses,
            "keys": keys,
            "transport": kind,
            "rank": 0,
            "is_shared_memory": kind == "shared memory",
            "master": (place.master_host, place.free_port()),
        }
        workers: list[dict[str, Any]]
        if script == "guide":
            workers = [master | {"rank": 1 + number} for number in range(sizes.num_workers)]
        elif kind == "echo":
            workers = [{"address": address} for address in addresses]
        else:
            workers = [
                {
                    "listen": f"tcp://{host}:{port}",
                    "keys": keys,
                    "threads": 1,
                    "insecure_network": kind == "tensorpipe",
                    "parent_pipe": True,
                }
                for host, port in addresses
            ]
        path = SCRIPTS / f"bench_rpc_{script}.py"
        for number, worker in enumerate(workers):
            argv = place.python("worker", [path, "worker", json.dumps(worker)])
            stack.callback(Process(argv, name=f"{kind} worker {number}, {place.name}").close)
        argv = place.python("master", [path, "master", json.dumps(master)])
        masters[kind] = Player(argv, name=f"{kind} master, {place.name}")
        # Last in, first out: masters leave before their workers.
        stack.callback(masters[kind].close)
    return masters


def describe_layer(report: LayerReport, sizes: LayerSizes) -> Sequence[str]:
    """The table of one place, in Markdown."""
    one_ms = report.row(ONE_MESSAGE).times.median_ms
    lines = [
        f"One layer at {report.place}: {sizes.tokens} rows of {sizes.width}, top-{sizes.top_k} of "
        f"{sizes.num_experts} experts, {sizes.num_workers} workers, nothing computed.",
        "",
        "| way | median ms | min | max | runs | x one message | MB there | MB back | dispatch, "
        "wait, combine ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        times, parts = row.times, row.parts_ms
        where = (
            f"{parts['dispatch']:.2f}, {parts['wait']:.2f}, {parts['combine']:.2f}" if parts else ""
        )
        lines.append(
            f"| {row.name} | {times.median_ms:.2f} | {times.min_ms:.2f} | {times.max_ms:.2f} | "
            f"{times.runs} | {times.median_ms / one_ms:.2f} | {_megabytes(row.bytes_there)} | "
            f"{_megabytes(row.bytes_back)} | {where} |"
        )
    return lines


def _megabytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1e6:.2f}"
