"""What bench_rpc.py makes of its measurements: tables in Markdown, and verdicts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench_rpc_layer import ECHO, GUIDE, ONE_MESSAGE, LayerReport
from bench_rpc_measure import PassReport, WayReport
from bench_rpc_scenes import EXACT, NAIVE, ONE_CALL, OVERLAP

PREFILL = "prefill"
LEAST_TO_NAIVE, LEAST_TO_ONE_CALL, MOST_OVER_BOUND = 2.0, 1.3, 1.15
LEAST_TO_CALLS, MOST_OVER_ECHO, LEAST_FEWER_BYTES = 15.0, 3.0, 3.5
MOST_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class Verdict:
    """A line of the acceptance.

    Attributes:
        claim: What is compared.
        value: What was measured.
        bound: What it must reach, or must not pass.
        is_met: Whether it does.
    """

    claim: str
    value: float
    bound: str
    is_met: bool

    @classmethod
    def at_least(cls, claim: str, value: float, bound: float) -> "Verdict":
        """A value that must reach a bound."""
        return cls(claim, value, f">= {bound:g}", value >= bound)

    @classmethod
    def at_most(cls, claim: str, value: float, bound: float) -> "Verdict":
        """A value that must not pass a bound."""
        return cls(claim, value, f"<= {bound:g}", value <= bound)


def judge_passes(report: PassReport) -> Iterator[Verdict]:
    """The lines of the acceptance about a pass."""
    behind = [each for each in report.ways if each.way == OVERLAP and each.place == "link"]
    for each in behind if report.name == PREFILL else ():
        claim = f"{report.name}, {each.place}, {each.transport}: {OVERLAP}"
        for way, least in ((NAIVE, LEAST_TO_NAIVE), (ONE_CALL, LEAST_TO_ONE_CALL)):
            other = report.way(each.place, each.transport, way)
            gain = other.times.median_ms / each.times.median_ms
            yield Verdict.at_least(f"{claim} against {way}", gain, least)
        over = each.times.median_ms / each.limits.bound
        yield Verdict.at_most(f"{claim} over the bound", over, MOST_OVER_BOUND)
    exact = max(each.difference for each in report.ways if each.way in EXACT)
    claim = f"{report.name}: largest difference from one device, float32 on the wire"
    yield Verdict.at_most(claim, exact, MOST_DIFFERENCE)


def judge_layer(report: LayerReport) -> Iterator[Verdict]:
    """The lines of the acceptance about one layer alone; behind a link all wait for the same."""
    one, calls = report.row(ONE_MESSAGE), report.row("zmq call per expert")
    ways = {row.name for row in report.rows}
    if report.place == "loopback":
        for name in (name for name in GUIDE if name in ways):
            gain = report.row(name).times.median_ms / one.times.median_ms
            yield Verdict.at_least(f"layer: {ONE_MESSAGE} against {name}", gain, LEAST_TO_CALLS)
        over = one.times.median_ms / report.row(ECHO).times.median_ms
        yield Verdict.at_most(f"layer: {ONE_MESSAGE} over {ECHO}", over, MOST_OVER_ECHO)
    for direction in ("there", "back"):
        few, many = (getattr(row, f"bytes_{direction}") for row in (one, calls))
        claim = f"layer, {report.place}: bytes {direction}, a call per expert over one message"
        yield Verdict.at_least(claim, many / few, LEAST_FEWER_BYTES)


def describe_machine(about: Mapping[str, Any]) -> Iterator[str]:
    """The environment."""
    yield (
        f"{about['cpu']}, {about['cores']} cores shared by master and workers; "
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    )


def describe_rates(probes: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """What the places carry, by plain TCP."""
    for place, probe in probes.items():
        yield (
            f"{place}: round trip {probe['round_trip_ms']:.2f} ms; one stream each way at once "
            f"{probe['there_of_both_gbit']:.2f} and {probe['back_of_both_gbit']:.2f} Gbit/s"
        )


def describe_pass(report: PassReport) -> Iterator[str]:
    """The tables of a pass."""
    shape = report.shape
    yield ""
    yield (
        f"### {report.name}: {shape.num_rows} rows of {shape.row_tokens} tokens"
        + (f", {shape.new_tokens} new tokens each" if shape.new_tokens else "")
    )
    yield (
        f"One device with all cores: {report.alone.median_ms:.0f} ms, "
        f"{report.alone_tokens_per_s:,.0f} tokens/s. Without experts: "
        f"{report.dense.median_ms:.0f} ms."
    )
    differs = "rows that differ" if shape.new_tokens else "largest difference"
    yield ""
    yield (
        "| place | transport | way | median ms (min-max) | tokens/s | x naive | x one call | "
        f"bytes/token/layer there, back | of the rate | {differs} |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for each in report.ways:
        times = each.times
        to_naive, to_one_call = (
            report.way(each.place, each.transport, way).times.median_ms / times.median_ms
            for way in (NAIVE, ONE_CALL)
        )
        amount = f"{each.difference:.0%}" if shape.new_tokens else f"{each.difference:.1e}"
        yield (
            f"| {each.place} | {each.transport} | {each.way} | {times.median_ms:.0f} "
            f"({times.min_ms:.0f}-{times.max_ms:.0f}) | {each.tokens_per_s:,.0f} | "
            f"{to_naive:.2f} | {to_one_call:.2f} | {each.bytes_there:,.0f}, {each.bytes_back:,.0f} "
            f"| {each.rate_share:.0%} | {amount} |"
        )
    yield ""
    yield (
        "| place | transport | way | dispatch ms | wait | combine | compute (all workers) | dense "
        "alone | experts alone | bytes / rate | of the bound | of this machine's cores |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for each in report.ways:
        yield f"| {each.place} | {each.transport} | {each.way} | {_parts(each)} |"


def _parts(each: WayReport) -> str:
    ms, limits = each.traced.ms, each.limits
    parts = [ms.get(part, 0.0) for part in ("dispatch", "wait", "combine", "compute")]
    numbers = [*parts, limits.dense, limits.experts, limits.wire]
    shares = [limits.bound / each.times.median_ms, limits.cores / each.times.median_ms]
    return " | ".join([f"{number:.0f}" for number in numbers] + [f"{part:.0%}" for part in shares])


def describe_verdicts(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The table of the acceptance."""
    yield ""
    yield "| acceptance, by medians | measured | wanted | |"
    yield "|---|---|---|---|"
    for verdict in verdicts:
        value = f"{verdict.value:.2g}" if verdict.value < 0.01 else f"{verdict.value:.2f}"
        is_met = "PASS" if verdict.is_met else "FAIL"
        yield f"| {verdict.claim} | {value} | {verdict.bound} | {is_met} |"
