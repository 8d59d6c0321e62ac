"""What bench_rpc.py measures of a pass: times, bytes, parts, limits and answers."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench_placement_clock import Times, progress
from bench_rpc_scenes import DENSE, ONE_CALL, WAYS, Cast, Scene, take_turns
from bench_rpc_workload import PassShape

ALONE = "one device"
Spans = Sequence[tuple[int, str, int, float, int]]  # of layer, part, worker, seconds, bytes


@dataclass(frozen=True)
class Traced:
    """Where time and bytes of a pass went, all layers together.

    Attributes:
        ms: Milliseconds of the four parts: dispatch, wait and combine of the master (of all its
            threads), compute of the workers (of all of them).
        bytes_there: Bytes to the workers.
        bytes_back: Bytes from them.
        slowest_ms: Milliseconds of the slowest worker of each layer's pass, added up.
    """

    ms: dict[str, float]
    bytes_there: int
    bytes_back: int
    slowest_ms: float

    @classmethod
    def of(cls, spans: Spans) -> "Traced":
        """Add up the spans of a pass."""
        ms: dict[str, float] = defaultdict(float)
        num_bytes: dict[str, int] = defaultdict(int)
        computed_ms: dict[tuple[int, int], float] = defaultdict(float)
        for layer, part, worker, seconds, size in spans:
            ms[part] += 1e3 * seconds
            num_bytes[part] += size
            if part == "compute":
                computed_ms[layer, worker] += 1e3 * seconds
        slowest: dict[int, float] = defaultdict(float)
        for (layer, _), each_ms in computed_ms.items():
            slowest[layer] = max(slowest[layer], each_ms)
        return cls(dict(ms), num_bytes["dispatch"], num_bytes["combine"], sum(slowest.values()))

    @classmethod
    def median(cls, runs: Sequence["Traced"]) -> "Traced":
        """The median of each number over several runs."""
        parts = {part for run in runs for part in run.ms}
        return cls(
            {part: statistics.median(run.ms.get(part, 0.0) for run in runs) for part in parts},
            round(statistics.median(run.bytes_there for run in runs)),
            round(statistics.median(run.bytes_back for run in runs)),
            statistics.median(run.slowest_ms for run in runs),
        )


@dataclass(frozen=True)
class Rate:
    """Bytes per second of one TCP stream each way at once, as measured."""

    there: float
    back: float

    @classmethod
    def of(cls, probe: Mapping[str, float]) -> "Rate":
        """What link_probe.py found."""
        return cls(probe["there_of_both_gbit"] / 8e-9, probe["back_of_both_gbit"] / 8e-9)


@dataclass(frozen=True)
class Limits:
    """Milliseconds of a pass that no overlap can save.

    Attributes:
        dense: The model without its experts, on the master.
        experts: The slower worker of each layer's pass, added up, all workers at once and the
            master waiting.
        wire: The busier direction's bytes over the rate measured.
        cores: Dense part and all workers' experts, over the cores of this machine, which master
            and workers share here.
    """

    dense: float
    experts: float
    wire: float
    cores: float

    @property
    def bound(self) -> float:
        """The largest of the first three: what separate machines would need."""
        return max(self.dense, self.experts, self.wire)


@dataclass(frozen=True)
class WayReport:
    """One way in one scene.

    Attributes:
        place: Where.
        transport: By what.
        way: How.
        times: Times of the pass.
        tokens_per_s: By the median.
        bytes_there: Bytes to the workers for each token and layer.
        bytes_back: Bytes from them for each token and layer.
        rate_share: Bytes of the busier direction, over what the link carries in the median time.
        traced: Where time and bytes went.
        limits: What it can't be faster than.
        difference: Largest difference of an answer from one device's: of a log-probability, or
            the share of rows with another text.
    """

    place: str
    transport: str
    way: str
    times: Times
    tokens_per_s: float
    bytes_there: float
    bytes_back: float
    rate_share: float
    traced: Traced
    limits: Limits
    difference: float


@dataclass(frozen=True)
class PassReport:
    """A pass.

    Attributes:
        name: prefill (score) or decode (generate).
        shape: What was computed.
        alone: Times of one device with all experts and cores.
        alone_tokens_per_s: By the median.
        dense: Times of the model without its experts.
        ways: All ways in all scenes.
    """

    name: str
    shape: PassShape
    alone: Times
    alone_tokens_per_s: float
    dense: Times
    ways: list[WayReport]

    def way(self, place: str, transport: str, way: str) -> WayReport:
        """One of them."""
        key = (place, transport, way)
        return next(each for each in self.ways if (each.place, each.transport, each.way) == key)


def measure_pass(
    cast: Cast,
    name: str,
    shape: PassShape,
    rates: Mapping[str, Rate],
    *,
    rounds: int,
    traced_rounds: int,
    num_layers: int,
    num_cores: int,
) -> PassReport:
    """Compare everybody in one pass.

    Args:
        cast: Everybody.
        name: Name of the pass.
        shape: What is computed.
        rates: Of each place.
        rounds: Runs that are timed.
        traced_rounds: Runs with bookkeeping, which are not timed.
        num_layers: MoE layers.
        num_cores: Cores of this machine.

    Returns:
        The comparison.
    """
    progress(f"{name}: first run of everybody")
    expected = cast.alone.ask(do="answers", way=None, **{"pass": name})["answers"]
    differences = {
        key: difference(turn()["answers"], expected)
        for key, turn in _turns(cast, name, "answers").items()
    }
    turns = _turns(cast, name, "time")
    turns[ALONE] = partial(cast.alone.ask, do="time", way=None, **{"pass": name})
    turns["dense"] = partial(cast.scenes[0].ask, "time", name, DENSE)
    turns["dense"]()
    timed = take_turns(turns, rounds=rounds, title=name)
    times = {key: Times.of([run["seconds"] for run in runs]) for key, runs in timed.items()}
    told = take_turns(_turns(cast, name, "trace"), rounds=traced_rounds, title=f"{name}, parts")
    traced = {
        key: Traced.median([Traced.of(run["spans"]) for run in runs]) for key, runs in told.items()
    }
    reports = []
    for scene in cast.scenes:
        alone_at_it = traced[_key(scene, ONE_CALL)]
        for way in WAYS:
            key = _key(scene, way)
            limits = make_limits(
                traced[key],
                alone_at_it,
                dense_ms=times["dense"].median_ms,
                rate=rates[scene.place.name],
                num_cores=num_cores,
            )
            reports.append(
                WayReport(
                    scene.place.name,
                    scene.transport,
                    way,
                    times[key],
                    1e3 * shape.num_counted / times[key].median_ms,
                    traced[key].bytes_there / shape.num_through / num_layers,
                    traced[key].bytes_back / shape.num_through / num_layers,
                    limits.wire / times[key].median_ms,
                    traced[key],
                    limits,
                    differences[key],
                )
            )
    return PassReport(
        name,
        shape,
        times[ALONE],
        1e3 * shape.num_counted / times[ALONE].median_ms,
        times["dense"],
        reports,
    )


def make_limits(
    traced: Traced, waiting: Traced, *, dense_ms: float, rate: Rate, num_cores: int
) -> Limits:
    """What a way can't be faster than.

    Args:
        traced: The way, which says how many bytes travel.
        waiting: The way in which the master waits while workers compute, which says how long these
            take with nothing else going on.
        dense_ms: The model without its experts.
        rate: Of the link.
        num_cores: Cores that all share.

    Returns:
        The limits.
    """
    wire_ms = 1e3 * max(traced.bytes_there / rate.there, traced.bytes_back / rate.back)
    busy_ms = dense_ms + waiting.ms.get("compute", 0.0)
    return Limits(dense_ms, waiting.slowest_ms, wire_ms, busy_ms / num_cores)


def difference(answers: Sequence[Any], expected: Sequence[Any]) -> float:
    """How far answers are from those expected.

    Args:
        answers: Log-probabilities, or lists of tokens, by row.
        expected: The same of one device.

    Returns:
        The largest difference of a log-probability, or the share of rows with other tokens.
    """
    if isinstance(expected[0], list):
        others = sum(got != wanted for got, wanted in zip(answers, expected, strict=True))
        return others / len(expected)
    return max(abs(got - wanted) for got, wanted in zip(answers, expected, strict=True))


def _turns(cast: Cast, which: str, do: str) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        _key(scene, way): partial(scene.ask, do, which, WAYS[way])
        for scene in cast.scenes
        for way in WAYS
    }


def _key(scene: Scene, way: str) -> str:
    return f"{scene.name}: {way}"
