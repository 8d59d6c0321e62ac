"""What bench_placement.py makes of its measurements: tables and verdicts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench_placement_clock import Times
from bench_placement_contestants import LOCAL, ONE_SLOT, Contestant, Forward, Pass, SlotParts
from bench_placement_layer import PLANNED, LayerPoint, Plan
from bench_placement_limit import Limit

PREFILL, TWO_SLOTS = "prefill", "2 slots"
LEAST_SPEEDUP, MOST_OVERHEAD = 1.7, 0.03


@dataclass(frozen=True)
class Row:
    """One contestant in one pass. Ratios are of least times, above 1 where this one is faster.

    Attributes:
        name: The contestant.
        devices: Device of every slot.
        total: Times of the whole forward.
        experts: Times of its calls of experts, all layers together.
        tokens_per_s: Tokens of the pass over the least time.
        to_one_slot: One slot's time over its own.
        to_local: The time of LocalDispatchers over its own.
        experts_to_one_slot: The same as ``to_one_slot``, of the experts alone.
        limit_to_one_slot: What ``to_one_slot`` would be if the experts gained what the machine
            gives at most (see Limit) and the rest nothing; None for one slot.
        difference: Largest difference of a logit from the local one's, over the largest logit.
        parts: Where the time went in each slot.
    """

    name: str
    devices: list[str]
    total: Times
    experts: Times
    tokens_per_s: float
    to_one_slot: float
    to_local: float
    experts_to_one_slot: float
    limit_to_one_slot: float | None
    difference: float
    parts: list[SlotParts]


@dataclass(frozen=True)
class PassReport:
    """One pass."""

    name: str
    tokens: int
    rows: list[Row]
    limits: list[Limit]


@dataclass(frozen=True)
class Verdict:
    """A line of the acceptance.

    Attributes:
        claim: What is compared.
        value: What was measured.
        bound: The least or the most that it may be.
        is_met: Whether it is.
        limit: What the machine allows, where that was measured.
    """

    claim: str
    value: float
    bound: float
    is_met: bool
    limit: float | None = None


def make_report(
    which: Pass,
    contestants: Sequence[Contestant],
    forwards: Mapping[str, Sequence[Forward]],
    differences: Mapping[str, float],
    parts: Mapping[str, list[SlotParts]],
    limits: Sequence[Limit],
) -> PassReport:
    """Compare the contestants of one pass."""
    total = {name: Times.of([f.total_s for f in each]) for name, each in forwards.items()}
    experts = {name: Times.of([f.experts_s for f in each]) for name, each in forwards.items()}
    one_ms, one_experts_ms = total[ONE_SLOT].min_ms, experts[ONE_SLOT].min_ms
    # Those who differ in nothing but the placement share the limit of their number of slots.
    limit_of = {
        len(limit.alone): limit.speedup(total_ms=one_ms, experts_ms=one_experts_ms)
        for limit in limits
    }
    rows = [
        Row(
            name=contestant.name,
            devices=[str(device) for device in contestant.devices],
            total=total[contestant.name],
            experts=experts[contestant.name],
            tokens_per_s=1e3 * which.num_tokens / total[contestant.name].min_ms,
            to_one_slot=one_ms / total[contestant.name].min_ms,
            to_local=total[LOCAL].min_ms / total[contestant.name].min_ms,
            experts_to_one_slot=one_experts_ms / experts[contestant.name].min_ms,
            limit_to_one_slot=limit_of.get(len(contestant.devices)),
            difference=differences[contestant.name],
            parts=parts[contestant.name],
        )
        for contestant in contestants
    ]
    return PassReport(which.name, which.num_tokens, rows, list(limits))


def judge(reports: Sequence[PassReport], points: Sequence[LayerPoint]) -> list[Verdict]:
    """The lines of the acceptance that were measured."""
    verdicts = []
    for report in reports:
        rows = {row.name: row for row in report.rows}
        if report.name == PREFILL and TWO_SLOTS in rows:
            speedup = rows[TWO_SLOTS].to_one_slot
            verdicts.append(
                Verdict(
                    f"{PREFILL}: two slots, times one slot",
                    *(speedup, LEAST_SPEEDUP, speedup >= LEAST_SPEEDUP),
                    limit=rows[TWO_SLOTS].limit_to_one_slot,
                )
            )
        if report.name == PREFILL:
            overhead = 1 / rows[ONE_SLOT].to_local - 1
            verdicts.append(_overhead(f"{PREFILL}: one slot over local, weights apart", overhead))
    for point in points:
        claim = f"layer, T = {point.tokens}: one slot over local, same weights"
        verdicts.append(_overhead(claim, point.overhead[ONE_SLOT]))
    return verdicts


def _overhead(claim: str, overhead: float) -> Verdict:
    return Verdict(claim, overhead, MOST_OVERHEAD, overhead <= MOST_OVERHEAD)


def describe_pass(report: PassReport) -> Iterator[str]:
    """The tables of one pass."""
    yield f"\n{report.name}: {report.tokens} tokens"
    yield (
        f"  {'':<21}{'min ms':>9}{'median':>9}{'max':>9}{'runs':>6}{'tokens/s':>10}{'x 1 slot':>9}"
        f"{'limit':>7}{'x local':>8}{'experts ms':>11}{'x 1 slot':>9}{'difference':>11}"
    )
    for row in report.rows:
        at_most = f"{row.limit_to_one_slot:.2f}" if row.limit_to_one_slot is not None else ""
        yield (
            f"  {row.name:<21}{row.total.min_ms:>9.1f}{row.total.median_ms:>9.1f}"
            f"{row.total.max_ms:>9.1f}{row.total.runs:>6}{row.tokens_per_s:>10,.0f}"
            f"{row.to_one_slot:>9.2f}{at_most:>7}{row.to_local:>8.2f}{row.experts.min_ms:>11.1f}"
            f"{row.experts_to_one_slot:>9.2f}{row.difference:>11.1e}"
        )
    yield (
        f"  {'in the experts, ms':<21}{'slot':<12}{'dispatch':>9}{'compute':>9}{'wait':>9}"
        f"{'combine':>9}{'MB moved':>10}"
    )
    for row in report.rows:
        for number, parts in enumerate(row.parts):
            ms = parts.ms
            yield (
                f"  {'' if number else row.name:<21}{parts.slot:<12}{ms['dispatch']:>9.2f}"
                f"{ms['compute']:>9.1f}{ms['wait']:>9.1f}{ms['combine']:>9.2f}"
                f"{parts.num_bytes / 1e6:>10.1f}"
            )
    for limit in report.limits:
        alone = " + ".join(f"{times.min_ms:.1f}" for times in limit.alone)
        yield (
            f"  limit, {limit.name}: one layer's experts, nothing planned or moved, {alone} ms one "
            f"by one, {limit.together.min_ms:.1f} ms at once: {limit.scaling:.2f}x"
        )


def describe_layer(points: Sequence[LayerPoint], plans: Sequence[Plan]) -> Iterator[str]:
    """The tables of the layer by itself."""
    names = list(points[0].times)
    yield "\none layer, no model around it: min ms, and overhead over local with the same weights"
    yield f"  {'T':>6}" + "".join(f"{name:>16}" for name in names) + f"{ONE_SLOT:>10}{'planned':>9}"
    for point in points:
        yield (
            f"  {point.tokens:>6}"
            + "".join(f"{point.times[name].min_ms:>16.3f}" for name in names)
            + f"{point.overhead[ONE_SLOT]:>+10.1%}{point.overhead[PLANNED]:>+9.1%}"
        )
    yield "\nplanning of one layer, Zipf routing: min us (median; of the local layer's time)"
    kinds = list(dict.fromkeys((plan.slots, plan.replicas) for plan in plans))
    yield f"  {'T':>6}" + "".join(f"{f'{s} slots, {r} replicas':>28}" for s, r in kinds)
    for tokens in dict.fromkeys(plan.tokens for plan in plans):
        cells = (
            f"{p.min_us:.0f} ({p.median_us:.0f}; {p.of_local:.1%})"
            for p in plans
            if p.tokens == tokens
        )
        yield f"  {tokens:>6}" + "".join(f"{cell:>28}" for cell in cells)


def describe_verdicts(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The table of the acceptance."""
    yield "\nAcceptance, by least times:"
    for verdict in verdicts:
        is_overhead = verdict.bound == MOST_OVERHEAD
        values = (
            f"{verdict.value:+.2%} (<= {verdict.bound:.0%})"
            if is_overhead
            else f"{verdict.value:.2f}x (>= {verdict.bound:.1f}x)"
        )
        at_most = f"; the machine allows {verdict.limit:.2f}x" if verdict.limit else ""
        yield f"  {'PASS' if verdict.is_met else 'FAIL'}  {verdict.claim}: {values}{at_most}"
