"""Who takes part in bench_rpc.py: a scene for each transport and place, and one device alone.

    scene:  master (bench_rpc_master.py) ── zmq or tensorpipe, loopback or link ── 2 workers

All scenes are there at once, so that they can take turns; those whose turn it is not do nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bench_placement_clock import progress, race
from bench_rpc_places import Place
from bench_rpc_player import Player, Process

MASTER = Path(__file__).with_name("bench_rpc_master.py")
NAIVE, ONE_CALL, OVERLAP, BF16, INT8 = (
    "naive",
    "one call",
    "one call, overlap",
    "... and bfloat16",
    "... and int8",
)
WAYS: dict[str, dict[str, str]] = {
    NAIVE: {"dispatcher": "naive"},
    ONE_CALL: {"dispatcher": "one call"},
    OVERLAP: {"dispatcher": "overlap"},
    BF16: {"dispatcher": "overlap", "wire": "bfloat16"},
    INT8: {"dispatcher": "overlap", "wire": "int8"},
}
DENSE = {"dispatcher": "dense"}
EXACT = (NAIVE, ONE_CALL, OVERLAP)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Scene:
    """A transport at a place.

    Attributes:
        transport: zmq or tensorpipe.
        place: Where master and workers are.
        master: The process that runs the model.
    """

    transport: str
    place: Place
    master: Player

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.transport}, {self.place.name}"

    def ask(self, do: str, which: str, way: Mapping[str, str]) -> dict[str, Any]:
        """Compute a pass in some way: time it, trace it, or give its answers."""
        return self.master.ask(**{"do": do, "pass": which, "way": way})


@dataclass(frozen=True)
class Cast:
    """Everybody.

    Attributes:
        scenes: With workers.
        alone: One device that holds all experts, with all threads.
    """

    scenes: Sequence[Scene]
    alone: Player


def start_cast(
    stack: ExitStack,
    places: Sequence[Place],
    transports: Sequence[str],
    *,
    options: Mapping[str, Any],
    num_workers: int,
    threads: int,
    threads_alone: int,
) -> Cast:
    """Start everybody, and wait until all have loaded.

    Args:
        stack: Ends them.
        places: The places.
        transports: The transports.
        options: What every master is told (checkpoint, passes, ...).
        num_workers: Workers of each scene.
        threads: Threads of each master and worker.
        threads_alone: Threads of the one device.

    Returns:
        All of them, ready.
    """

    def master(name: str, place: Place | None, **more: Any) -> Player:
        said = json.dumps({"workers": [], "threads": threads, **options, **more})
        argv = (place or Place("alone")).python("master", [MASTER, said])
        player = Player(argv, name=f"master, {name}")
        stack.callback(player.close)
        return player

    scenes = []
    for place in places:
        for transport in transports:
            name = f"{transport}, {place.name}"
            progress(f"starting: {name}")
            keys = place.keys if transport == "zmq" else None
            addresses = []
            for number in range(num_workers):
                addresses.append(f"tcp://{place.worker_host}:{place.free_port()}")
                argv = ["-m", "moe_lightning", "worker", "--parent_pipe", "true"]
                argv += ["--listen", addresses[-1], "--model.checkpoint", options["checkpoint"]]
                argv += ["--threads", str(threads)]
                if keys is not None:
                    argv += ["--keys", str(keys)]
                if transport == "tensorpipe":
                    argv += ["--insecure-network", "true"]
                process = Process(place.python("worker", argv), name=f"worker {number}, {name}")
                stack.callback(process.close)
            player = master(
                name,
                place,
                workers=addresses,
                transport=transport,
                keys=None if keys is None else str(keys),
            )
            scenes.append(Scene(transport, place, player))
            player.wait_until_ready()  # one scene after the other: loading takes all cores
    alone = master("alone", None, threads=threads_alone)
    alone.wait_until_ready()
    return Cast(scenes, alone)


def take_turns(
    turns: Mapping[str, Callable[[], Result]], *, rounds: int, title: str
) -> dict[str, list[Result]]:
    """Let everybody take turns, in an order that changes with every round.

    Args:
        turns: One run of each.
        rounds: How many runs each gets.
        title: What is measured, for the progress on stderr.

    Returns:
        The results of each.
    """
    results: dict[str, list[Result]] = {name: [] for name in turns}
    for number in range(rounds):
        for name, new in race(turns, seconds=0.0, title=title, seed=number).items():
            results[name] += new
        progress(f"{title}: {number + 1} of {rounds}")
    return results
