"""What bench_experts.py makes of its measurements: tables, verdicts and JSON."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bench_experts_contestants import Contestant, Side
from bench_experts_layers import Layer, Point
from bench_experts_machine import Rates


@dataclass(frozen=True)
class Row:
    """One contestant at one point.

    Attributes:
        name: The contestant.
        side: Whose it is.
        min_s: Its best time.
        median_s: Its median time.
        runs: How often it ran.
        speedup: Against the best of transformers at this point; None if none was measured.
        peers: Against each peer at this point: the peer's best time over its own.
        gb_per_s: Bytes of the distinct experts' weights, as it stores them, per second.
        gflop_per_s: Useful operations per second.
        fraction_of_limit: The least time that the machine's rates allow over its best time.
        relative_error: Frobenius norm of the difference to eager float32 over that of the latter.
    """

    name: str
    side: Side
    min_s: float
    median_s: float
    runs: int
    speedup: float | None
    peers: dict[str, float]
    gb_per_s: float
    gflop_per_s: float
    fraction_of_limit: float | None
    relative_error: float


@dataclass(frozen=True)
class PointReport:
    """One point of one layer."""

    model: str
    tokens: int
    routing: str
    num_distinct: int
    tokens_per_expert: float
    best_of_transformers: str | None
    rows: list[Row]


class Line(NamedTuple):
    """A line of the acceptance: the least speed-up against transformers' best."""

    backend: str
    at_least: float
    tokens: tuple[int, ...] | None  # None: at every number of tokens


ACCEPTANCE = (
    Line("cpu_packed", 1.6, (128,)),
    Line("cpu_half", 2.0, (128,)),
    Line("cpu_int8", 3.4, (128, 512)),
    Line("auto", 1 / 1.03, None),
)


PAIRS = (
    *(("cpu_packed", "vllm"), ("auto", "vllm"), ("cpu_half", "vllm"), ("cpu_int8", "ort")),
    *(("triton", "moe_ops"), ("auto", "moe_ops")),
)


@dataclass(frozen=True)
class Verdict:
    """A line of the acceptance at one point."""

    backend: str
    at_least: float
    model: str
    tokens: int
    routing: str
    speedup: float
    is_met: bool


def make_report(
    model: str,
    layer: Layer,
    point: Point,
    times_s: dict[str, list[float]],
    errors: dict[str, float],
    contestants: Sequence[Contestant],
    rates: Rates,
) -> PointReport:
    """Compare all contestants of one point."""
    measured = [contestant for contestant in contestants if times_s.get(contestant.name)]
    best_s = {contestant.name: min(times_s[contestant.name]) for contestant in measured}
    theirs = [contestant.name for contestant in measured if contestant.side == "transformers"]
    baseline = min(theirs, key=best_s.__getitem__) if theirs else None
    peers = [contestant.name for contestant in measured if contestant.side == "peer"]
    flop = layer.flop(point.tokens)
    rows = []
    for contestant in measured:
        name = contestant.name
        num_bytes = point.num_distinct * layer.expert_params * contestant.bytes_per_weight
        least_s = rates.least_s(num_bytes=num_bytes, flop=flop, is_int8=contestant.is_int8)
        rows.append(
            Row(
                name=name,
                side=contestant.side,
                min_s=best_s[name],
                median_s=statistics.median(times_s[name]),
                runs=len(times_s[name]),
                speedup=best_s[baseline] / best_s[name] if baseline else None,
                peers={peer: best_s[peer] / best_s[name] for peer in peers},
                gb_per_s=num_bytes / best_s[name] / 1e9,
                gflop_per_s=flop / best_s[name] / 1e9,
                fraction_of_limit=least_s / best_s[name] if least_s is not None else None,
                relative_error=errors[name],
            )
        )
    return PointReport(
        model=model,
        tokens=point.tokens,
        routing=point.routing,
        num_distinct=point.num_distinct,
        tokens_per_expert=point.tokens * layer.top_k / point.num_distinct,
        best_of_transformers=baseline,
        rows=rows,
    )


def describe_rates(rates: Rates) -> str:
    """One line."""
    int8 = rates.int8_flop_per_s
    return (
        f"read {rates.read_bytes_per_s / 1e9:.1f} GB/s, matrix products "
        f"{rates.float_flop_per_s / 1e9:,.0f} GFLOP/s"
        + (f", int8 {int8 / 1e9:,.0f} GOP/s" if int8 is not None else "")
    )


def describe_point(report: PointReport) -> Iterator[str]:
    """The table of one point."""
    best = report.best_of_transformers
    yield (
        f"\n{report.model}, T = {report.tokens}, {report.routing}: {report.num_distinct} distinct "
        f"experts, {report.tokens_per_expert:.1f} rows each"
        + (f"; x best: against {best}" if best else "")
    )
    peers = [row.name for row in report.rows if row.side == "peer"]
    yield (
        f"  {'':<26}{'min ms':>9}{'median':>9}{'runs':>6}{'x best':>8}"
        + "".join(f"{'x ' + peer:>9}" for peer in peers)
        + f"{'GB/s':>8}{'GFLOP/s':>9}{'of limit':>9}{'rel. error':>11}"
    )
    for row in report.rows:
        yield (
            f"  {row.name:<26}{row.min_s * 1e3:>9.3f}{row.median_s * 1e3:>9.3f}{row.runs:>6}"
            f"{_ratio(row.speedup):>8}"
            + "".join(f"{_ratio(row.peers[peer]):>9}" for peer in peers)
            + f"{row.gb_per_s:>8.1f}{row.gflop_per_s:>9,.0f}{_ratio(row.fraction_of_limit):>9}"
            f"{row.relative_error:>11.1e}"
        )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def judge(reports: Sequence[PointReport]) -> list[Verdict]:
    """Each line of the acceptance at each point where it was measured."""
    verdicts = []
    for line in ACCEPTANCE:
        for report in reports:
            if line.tokens is not None and report.tokens not in line.tokens:
                continue
            for row in report.rows:
                if row.name == line.backend and row.speedup is not None:
                    verdicts.append(
                        Verdict(
                            backend=line.backend,
                            at_least=line.at_least,
                            model=report.model,
                            tokens=report.tokens,
                            routing=report.routing,
                            speedup=row.speedup,
                            is_met=row.speedup >= line.at_least,
                        )
                    )
    return verdicts


def describe_verdicts(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The table of the acceptance; of ``auto`` the worst point of each model."""
    yield "\nAcceptance, speed-up against the best of transformers at the point:"
    if not verdicts:
        yield "  no line can be judged: its backends, T or transformers were not measured"
    groups: dict[tuple[str, float, str, str], list[Verdict]] = {}
    for verdict in verdicts:
        tokens = "every T" if verdict.backend == "auto" else f"T = {verdict.tokens}"
        key = (verdict.backend, verdict.at_least, tokens, verdict.model)
        groups.setdefault(key, []).append(verdict)
    for (backend, at_least, tokens, model), group in groups.items():
        worst = min(group, key=lambda verdict: verdict.speedup)
        yield (
            f"  {'PASS' if worst.is_met else 'FAIL'}  {backend:<11}>= {at_least:.2f}x  "
            f"{tokens:<9}{model:<18}{worst.speedup:>6.2f}x at worst "
            f"(T = {worst.tokens}, {worst.routing}; {len(group)} point{'s' * (len(group) > 1)})"
        )


def describe_peers(reports: Sequence[PointReport]) -> Iterator[str]:
    """Ours against the peers that compute as exactly: the range over models and routings."""
    ratios: dict[tuple[str, str, int], list[float]] = {}
    for name, peer in PAIRS:
        for report in reports:
            for row in report.rows:
                if row.name == name and peer in row.peers:
                    key = (name, peer, report.tokens)
                    ratios.setdefault(key, []).append(row.peers[peer])
    if ratios:
        yield "\nPeer's time / ours, over models and routings:"
    for (name, peer, tokens), values in ratios.items():
        yield (
            f"  {name:<11} against {peer:<8}T = {tokens:<6}{min(values):>6.2f}x to "
            f"{max(values):.2f}x, median {statistics.median(values):.2f}x"
        )
