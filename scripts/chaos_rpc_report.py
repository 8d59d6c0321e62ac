"""What is said about runs with faults: a line for each, and a table of all."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from chaos_rpc_plan import Plan
from chaos_rpc_record import Run
from chaos_rpc_verdict import Verdict


@dataclass(frozen=True, slots=True)
class Line:
    """A run in short.

    Attributes:
        plan: What was to happen.
        stages: Stages in which it happened.
        outcome: How the run ended.
        noticed_s: For each worker that was struck, after how long it was given up, if it was.
        reasons: Why.
        adopted_s: How long it took to load the experts of the lost elsewhere.
        orphans_s: How long local workers outlived the master.
        run_s: How long the master was there.
        usual_s: How long it is without faults.
        waited_s: How long the master waited for a core of the machine.
        violations: What must not be.
    """

    plan: Plan
    stages: list[str]
    outcome: str
    noticed_s: list[float | None]
    reasons: list[str]
    adopted_s: float | None
    orphans_s: float
    run_s: float
    usual_s: float
    waited_s: float
    violations: list[str]

    def __str__(self) -> str:
        said = [f"{self.plan!s:<62}", f"{self.outcome:<10} {self.run_s:5.1f} s"]
        if not self.stages and self.plan.faults:
            said.append("over before it happened")
        noticed = [f"{seconds:.2f} s" for seconds in self.noticed_s if seconds is not None]
        if noticed:
            said.append(
                f"noticed after {', '.join(noticed)} ({'; '.join(r[:50] for r in self.reasons)})"
            )
        if self.adopted_s is not None:
            said.append(f"adopted in {self.adopted_s:.2f} s")
        if self.plan.start == "local" and self.outcome == "killed":
            said.append(f"workers gone after {self.orphans_s:.2f} s")
        if self.waited_s > 0.2 * self.run_s:
            said.append(f"[{self.waited_s:.1f} s without a core]")
        return "  ".join([*said, *(f"\n      VIOLATION {each}" for each in self.violations)])


def line_of(run: Run, verdict: Verdict, usual: Run | None) -> Line:
    """A run in short."""
    return Line(
        plan=run.plan,
        stages=[strike.fault.stage for strike in run.strikes],
        outcome=verdict.outcome,
        noticed_s=verdict.noticed_s,
        reasons=verdict.reasons,
        adopted_s=verdict.adopted_s,
        orphans_s=run.orphans_s,
        run_s=run.run_s,
        usual_s=run.run_s if usual is None else usual.run_s,
        waited_s=run.waited_s(),
        violations=verdict.violations,
    )


def table_of(lines: Sequence[Line]) -> str:
    """Runs by what happened first, and when."""
    groups: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        if line.plan.faults:
            first = line.plan.faults[0]
            kind = first.kind
            if kind == "stop" and first.awake_s is not None:
                kind = "stop, woken"  # type: ignore[assignment]
            sort = "" if line.plan.sort == "one" else f" ({line.plan.sort})"
            groups[f"{kind}{sort}", line.plan.transport].append(line)
    head = (
        "fault",
        "transport",
        "runs",
        "ok",
        "refused",
        "noticed, median",
        "at most",
        "run at most",
    )
    rows = [head, *(_row(key, group) for key, group in sorted(groups.items()))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _row(key: tuple[str, str], lines: Sequence[Line]) -> tuple[str, ...]:
    noticed = [s for line in lines for s in line.noticed_s if s is not None]
    num_refused = sum(line.outcome.startswith("refused") for line in lines)
    return (
        *key,
        str(len(lines)),
        str(sum(not line.violations for line in lines)),
        str(num_refused),
        f"{median(noticed):.2f} s" if noticed else "-",
        f"{max(noticed):.2f} s" if noticed else "-",
        f"{max(line.run_s for line in lines):.1f} s",
    )


def report_of(seed: int, lines: Sequence[Line], **settings: Any) -> dict[str, Any]:
    """All of it, for a file."""
    return {"seed": seed, "settings": settings, "runs": [asdict(line) for line in lines]}
