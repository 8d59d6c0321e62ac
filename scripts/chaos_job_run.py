"""One run: the command is started, struck, and started again until it ends by itself."""

import math
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from chaos_job_plan import Plan, Strategy, Strike
from chaos_job_processes import end_all, send
from chaos_job_scene import LOOK_S, NUM_RANKS, RUN_S, TIMEOUT_S, Scene, Start, Usual
from chaos_job_verdict import Ending, judge_ending, judge_outcome, judge_rows
from chaos_job_watch import Stage, rows_begun, rows_done
from chaos_rpc_team import wait_until

MOST_STARTS = 6
GONE_S = 30.0  # that workers and ranks have to end by themselves
# A rank that has not met the first one yet knows nothing of its death, and tries twice.
MEETING_S = 2 * TIMEOUT_S
HANDLERS_S = 0.1  # after the fork, handlers of signals are there
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}


@dataclass(slots=True)
class Run:
    """What came of a plan.

    Attributes:
        plan: The plan.
        endings: How each start ended.
        violations: What must not be.
    """

    plan: Plan
    endings: list[Ending] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        said = "; ".join(map(str, self.endings))
        violations = "".join(f"\n      VIOLATION {each}" for each in self.violations)
        return f"[{self.plan.number}] {self.plan.strategy}: {said}{violations}"


def carry_out(plan: Plan, scene: Scene, usuals: Mapping[Strategy, Usual]) -> Run:
    """Carry a plan out, and judge what came of it.

    Args:
        plan: The plan.
        scene: Where.
        usuals: Undisturbed runs.

    Returns:
        What came of it.
    """
    usual, run = usuals[plan.strategy], Run(plan)
    directory = scene.directory / f"{plan.number:03d}"
    directory.mkdir()
    starts: list[Start] = []
    done: list[int] = []
    is_hurried = False
    while len(starts) < MOST_STARTS:
        strike = plan.strikes[len(starts)] if len(starts) < len(plan.strikes) else None
        start = scene.start(plan.strategy, f"start{len(starts)}", directory / "out")
        starts.append(start)
        ending = _attend(start, strike, usual)
        run.endings.append(ending)
        if ending.code == 0:
            break
        if strike is not None and strike.is_hurried:
            is_hurried = True
        else:
            _see_off(start, ending)
        before, done = done, _rows_done(start)
        lost = _lost(start, done)
        ending.num_rows_redone = sum(len(rows) for _, rows in lost)
        num_lost = [sum(rank == r for rank, _ in lost) for r in range(NUM_RANKS)]
        run.violations += judge_rows(before, done, num_lost, is_hurried=is_hurried)
        if ending.stage is None:
            break  # nobody struck it, and yet it did not end with 0
    for start, ending in zip(starts, run.endings, strict=True):
        _see_off(start, ending)
        run.violations += judge_ending(ending, usual)
    if run.endings[-1].code == 0:
        try:
            run.violations += judge_outcome(starts[-1].files, usual, done)
        except OSError as error:
            run.violations.append(f"it ended with 0, but {error}")
    else:
        run.violations.append(f"it did not end with 0 in {len(starts)} starts")
    return run


def _lost(start: Start, done: list[int]) -> list[tuple[int, set[int]]]:
    """Batches that were begun and are not in the ledger: rank, and rows that are not."""
    known = set(done)
    batches = ((rank, set(rows) - known) for rank, rows in rows_begun(start.marks))
    return [(rank, rows) for rank, rows in batches if rows]


def _rows_done(start: Start) -> list[int]:
    files = start.files
    return list(range(files.num_rows)) if files.is_finished else rows_done(files.output)


def _attend(start: Start, strike: Strike | None, usual: Usual) -> Ending:
    """Be there until a start has ended, and all that it made; strike when it is time."""
    master, files, ending = start.master, start.files, Ending(strike)
    since_s = master.start_s
    while master.is_there:
        files.look()
        pids = None
        if strike is not None and ending.stage is None:
            pids = _victims(strike, start, usual)
        if strike is not None and pids is not None:
            num_begun = sum(len(rows) for _, rows in rows_begun(start.marks))
            ending.is_finished = files.is_finished
            if not ending.is_finished:
                num_before = files.num_rows_before
                ending.num_rows_unbegun = files.num_rows - num_before - num_begun
            ending.stage, since_s = list(files.begun_s)[-1], time.monotonic()
            _strike(strike, pids, start)
        if time.monotonic() > since_s + RUN_S:
            ending.has_hung = True
            master.end()
        time.sleep(LOOK_S)
    ending.code, ending.said = master.code, master.said()
    ending.after_s = master.end_s - since_s
    return ending


def _see_off(start: Start, ending: Ending) -> None:
    """Wait until all that a start has made is gone; make sure that it is."""
    master_end_s = start.master.end_s
    has_met = ending.stage not in (None, "planning")
    timeout_s = GONE_S + (0 if has_met else MEETING_S) - (time.monotonic() - master_end_s)
    if start.others():
        if not wait_until(lambda: not start.others(), timeout_s):
            ending.left += str(start.others())
            end_all(start.token)
        ending.orphans_s = time.monotonic() - master_end_s


def _due_s(strike: Strike, start: Start, usual: Usual) -> float:
    """When it is time; infinity as long as that is not known."""
    files = start.files
    left = 1 - files.num_rows_before / files.num_rows
    if strike.when in ("after a part", "after a line"):
        number = files.num_parts if strike.when == "after a part" else files.num_lines
        return 0.0 if number > int(strike.fraction * left * usual.num_parts) else math.inf
    stage: Stage = "predicting" if strike.when == "last tenth" else strike.when
    if stage not in files.begun_s:
        return math.inf
    length_s = usual.stages_s[stage] * (left if stage == "predicting" else 1)
    after_s = strike.fraction * length_s
    if strike.when == "last tenth":
        after_s = length_s + usual.stages_s["merging"] - strike.fraction * usual.length_s / 10
    earliest_s = start.master.start_s + (0 if strike.signal == "KILL" else HANDLERS_S)
    return max(files.begun_s[stage] + after_s, earliest_s)


def _victims(strike: Strike, start: Start, usual: Usual) -> list[int] | None:
    """Whom of the others a strike is for; None before it is time, and before they are there."""
    if time.monotonic() < _due_s(strike, start, usual):
        return None
    if strike.victim in ("master", "group"):
        return []
    others = [pid for pid, command in start.others().items() if "moe_lightning" in command]
    if strike.victim == "two workers":
        return others if len(others) == 2 else None
    return [others[strike.other % len(others)]] if others else None


def _strike(strike: Strike, others: list[int], start: Start) -> None:
    """Send the signal, to nobody but the start's own processes."""
    number, master = SIGNALS[strike.signal], start.master
    for pid in others:
        send(pid, start.token, number)
    if strike.victim in ("master", "two ranks", "master and one"):
        master.send(number)
    if strike.victim == "group" and master.is_there:
        assert master.pid > 1, "0 and 1 would be other groups"
        with suppress(ProcessLookupError):
            if os.getpgid(master.pid) == master.pid:  # its own, as the nursery makes it
                os.killpg(master.pid, number)
