"""What is said about disturbed predict jobs: a line for each strategy."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from chaos_job_run import Run

COLUMNS = ("strategy", "runs", "restarts", "rows redone", "orphans", "verdict", "struck")


def table_of(runs: Sequence[Run]) -> str:
    """Make a table.

    Args:
        runs: What came of the plans.

    Returns:
        A line for each strategy: runs, starts after the first, the most rows that had to be
        computed again after one death, how long the longest-lived process outlived who made it, and
        who was struck how often.
    """
    lines = [COLUMNS]
    for strategy in dict.fromkeys(run.plan.strategy for run in runs):
        own = [run for run in runs if run.plan.strategy == strategy]
        endings = list(chain.from_iterable(run.endings for run in own))
        struck = Counter(
            f"{e.strike.victim} {e.strike.signal}" for e in endings if e.strike and e.stage
        )
        struck["too late"] = sum(e.strike is not None and e.stage is None for e in endings)
        num_wrong = sum(bool(run.violations) for run in own)
        lines.append(
            (
                strategy,
                f"{len(own)}",
                f"{len(endings) - len(own)}",
                f"{max(e.num_rows_redone for e in endings)}",
                f"{max(e.orphans_s for e in endings):.1f} s",
                f"{num_wrong} WRONG" if num_wrong else "ok",
                ", ".join(f"{who} {count}" for who, count in sorted(struck.items()) if count),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
