"""How bench_placement.py measures: contestants take turns, and clocks wait for GPUs."""

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def race(
    turns: Mapping[str, Callable[[], Result]], *, seconds: float, title: str, seed: int = 0
) -> dict[str, list[Result]]:
    """Let contestants take turns, so that a busy minute of the machine hits all of them.

    Every round has another order: nobody always runs on the caches that the same one left behind.

    Args:
        turns: One run of each contestant; what it returns is kept.
        seconds: For how long; the last round is finished, and the first one in any case.
        title: What is measured, for the progress on stderr.
        seed: Seed of the orders.

    Returns:
        The results of each contestant, in the order of its runs.
    """
    shuffle = random.Random(seed).shuffle
    results: dict[str, list[Result]] = {name: [] for name in turns}
    start_s = said_s = time.perf_counter()
    names = list(turns)
    while True:
        shuffle(names)
        for name in names:
            results[name].append(turns[name]())
        now_s = time.perf_counter()
        if now_s - start_s >= seconds:
            return results
        if now_s - said_s > 10:
            progress(f"{title}: {now_s - start_s:.0f} of {seconds:g} s")
            said_s = now_s


def progress(message: str) -> None:
    """One line on stderr."""
    print(f"  {message}", file=sys.stderr, flush=True)


def seconds_of(call: Callable[[], Any], devices: Sequence[torch.device]) -> float:
    """Seconds until a call has returned and the GPUs among the devices have nothing left to do."""
    _synchronize(devices)
    start_s = time.perf_counter()
    call()
    _synchronize(devices)
    return time.perf_counter() - start_s


def _synchronize(devices: Sequence[torch.device]) -> None:
    for device in set(devices):
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class PartClock:
    """Adds up the time between pairs of marks, without waiting for a GPU in between.

    Args:
        device: Where the work between the marks is queued.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Start a part, or end the one that was started."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def take_s(self) -> float:
        """Seconds in all parts since the last call; the device must have nothing left to do."""
        marks, self._marks = self._marks, []
        parts = list(pairwise(marks))[::2]
        if self._device.type == "cuda":
            return float(sum(start.elapsed_time(end) for start, end in parts)) / 1e3
        return float(sum(end - start for start, end in parts))


@dataclass(frozen=True)
class Times:
    """What is said of the times of one contestant.

    Attributes:
        min_ms: The least.
        median_ms: The median.
        max_ms: The longest.
        runs: How many there are.
    """

    min_ms: float
    median_ms: float
    max_ms: float
    runs: int

    @classmethod
    def of(cls, times_s: Sequence[float]) -> "Times":
        """Sum up a list of seconds."""
        in_ms = [1e3 * each_s for each_s in times_s]
        return cls(min(in_ms), statistics.median(in_ms), max(in_ms), len(in_ms))
