"""Whether a run bore what was done to it."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from chaos_rpc_record import Run, Setting, Strike
from chaos_rpc_run import BETWEEN_SIGNALS_S

KILL_NOTICED_S = 1.0
INTERRUPTED_S = 2.0
ORPHANS_S = 30.0
ORPHANS_THAT_SERVED_S = 2.0
LOOKS_AGAIN_S = 0.1
SLACK_S = 10.0
SCORES_WITHIN = 1e-4


@dataclass(slots=True)
class Verdict:
    """What a run was found to be.

    Attributes:
        outcome: How it ended, in a word.
        violations: What must not be.
        noticed_s: For each strike, after how long the master gave the worker up; None if it did
            not have to.
        reasons: Why it did.
        adopted_s: How long others took to load the experts of the lost.
    """

    outcome: str
    violations: list[str] = field(default_factory=list)
    noticed_s: list[float | None] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    adopted_s: float | None = None


def judge(run: Run, setting: Setting, reference: Path, usual: Run | None) -> Verdict:
    """Judge a run.

    Args:
        run: The run.
        setting: What all runs have in common.
        reference: The predictions of one device.
        usual: A run without faults; None if this is one.

    Returns:
        The verdict.
    """
    verdict = Verdict("ok")
    code, said = run.master.code, run.master.said()
    is_killed = any(strike.fault.kind == "kill_master" for strike in run.strikes)
    too_early = [
        strike
        for strike in run.strikes
        if strike.at_s <= run.when("met") and not strike.fault.is_masters
    ]
    if "Traceback" in said:
        verdict.violations.append("the master said a traceback")
    if is_killed and code == -9:
        verdict.outcome = "killed"
    elif code == 5:
        verdict.outcome = "interrupted"
        verdict.violations += _interrupted(run)
    elif code == 0:
        verdict.violations += compare(reference, run.output / "predictions.jsonl")
        verdict.violations += _expected_of_who_goes_on(run)
    elif run.plan.sort == "last" and code == 6:
        verdict.outcome = "refused, 6"
        verdict.violations += [
            f"its last words do not name {what}: {said[-500:]}"
            for what in (run.names[0], "layer", "expert")
            if what not in said
        ]
        verdict.violations += _nothing_written(run)
    elif too_early and code in (2, 6):
        verdict.outcome = f"refused, {code}"
        names = {name for s in too_early for name in (s.name, f"local worker {s.fault.worker}")}
        if not any(name in said for name in names):
            verdict.violations.append(f"its last words name none of {sorted(names)}: {said[-500:]}")
        verdict.violations += _nothing_written(run)
    else:
        verdict.outcome = f"exit {code}"
        verdict.violations.append(f"exit code {code}: {said[-1000:]}")
    for strike in run.strikes:
        if strike.fault.kind == "nap_master" and run.when("lost") < math.inf:
            verdict.violations.append("after a nap, the master gave a worker up")
        if not strike.fault.is_masters:
            _judge_notice(run, strike, setting, usual, verdict)
    adopted = [mark.at_s for mark in run.marks if mark.name == "adopted"]
    if adopted and run.when("lost") < math.inf:
        verdict.adopted_s = adopted[-1] - run.when("lost")
    served = run.when("met") < math.inf
    orphans_s = ORPHANS_THAT_SERVED_S if served else ORPHANS_S
    if run.orphans_s > orphans_s:
        verdict.violations.append(
            f"local workers were there {run.orphans_s:.1f} s after the master"
        )
    if usual is not None and run.run_s > (limit_s := limit_of(run, setting, usual)):
        verdict.violations.append(f"it took {run.run_s:.1f} s, more than {limit_s:.1f} s")
    return verdict


def limit_of(run: Run, setting: Setting, usual: Run) -> float:
    """Longest time that a run may take: a few times what it takes without faults, and the waits."""
    waits_s = sum(
        notice_limit(strike, setting) + (strike.fault.awake_s or 0) for strike in run.strikes
    )
    if any(strike.at_s <= run.when("met") for strike in run.strikes):
        waits_s += setting.join_timeout_s[run.plan.start]
    return 3 * usual.run_s + waits_s + run.waited_s() + SLACK_S


def notice_limit(strike: Strike, setting: Setting) -> float:
    """By when a master must have given up a worker."""
    return setting.timeout_s * 1.1 if strike.fault.kind == "stop" else KILL_NOTICED_S


def _judge_notice(
    run: Run, strike: Strike, setting: Setting, usual: Run | None, verdict: Verdict
) -> None:
    lost_at_s = run.lost_at_s(strike)
    is_lost = lost_at_s < math.inf
    verdict.noticed_s.append(lost_at_s - strike.at_s if is_lost else None)
    verdict.reasons += [
        mark.text.rpartition(" is lost: ")[2]
        for mark in run.marks
        if mark.name == "lost" and mark.at_s == lost_at_s
    ]
    slept_s = strike.awake_at_s - strike.at_s
    was_back_s = strike.at_s if strike.fault.kind == "restart" else strike.awake_at_s
    if was_back_s < run.when("met") and not is_lost:
        return  # the master has waited for it
    if is_lost and slept_s < 0.8 * setting.timeout_s:
        verdict.violations.append(f"{strike.name} was given up after a nap of {slept_s:.1f} s")
    limit_s = notice_limit(strike, setting) + run.waited_s(strike.at_s, lost_at_s)
    if strike.at_s < run.when("ready") and usual is not None:
        # Who loads does not look; that no worker was lost is seen afterwards.
        limit_s += usual.when("ready") - usual.when("met")
    # While the master waits for one worker, it does not look at others.
    others = (run.lost_at_s(other) for other in run.strikes if other is not strike)
    waited_s = max((s - strike.at_s for s in others if s < math.inf), default=0.0)
    limit_s = max(limit_s, waited_s + LOOKS_AGAIN_S)
    end_s = min(lost_at_s, run.when("done"), run.master.end_s)
    if run.master.code == 0 and slept_s > limit_s and end_s - strike.at_s > limit_s:
        verdict.violations.append(
            f"{strike.name} was given up after {end_s - strike.at_s:.2f} s, later than "
            f"{limit_s:.2f} s"
            if is_lost
            else f"nobody noticed that {strike.name} was gone"
        )


def _expected_of_who_goes_on(run: Run) -> list[str]:
    is_lost = run.when("lost") < math.inf
    adopted = [mark.text for mark in run.marks if mark.name == "adopted"]
    if run.plan.sort == "last" and is_lost:
        return ["it went on without its last worker"]
    num_bytes = None
    if run.bytes_before is not None and run.bytes_after is not None:
        num_bytes = run.bytes_after - run.bytes_before
    if run.plan.sort == "replicas" and (adopted or num_bytes):
        return [f"replicas were there, and yet {num_bytes} bytes were read: {adopted}"]
    if run.plan.sort == "one" and is_lost and num_bytes == 0:
        return [f"{adopted}, but nobody has read anything"]
    if run.plan.sort == "adopted" and is_lost and not any("the master" in a for a in adopted):
        return [f"the master was to adopt, but: {adopted}"]
    if run.plan.sort in ("one", "two") and is_lost and not adopted:
        return ["nobody adopted the experts of the lost"]
    return []


def _interrupted(run: Run) -> list[str]:
    strike = next((s for s in run.strikes if s.fault.kind.startswith("interrupt")), None)
    if strike is None:
        return ["nobody has interrupted it"]
    at_s, took_s = strike.at_s, run.master.end_s - strike.at_s
    # After one Ctrl-C the batch in flight is finished, however long that takes.
    is_at_once = strike.fault.kind == "interrupt_twice" or at_s < run.when("ready")
    if is_at_once and took_s > BETWEEN_SIGNALS_S + INTERRUPTED_S + run.waited_s(at_s):
        return [f"it ended only {took_s:.2f} s after it was interrupted"]
    return _nothing_written(run) if at_s < run.when("done") else []


def _nothing_written(run: Run) -> list[str]:
    written = run.output / "predictions.jsonl"
    return [f"{written} is there although it failed"] if written.exists() else []


def compare(reference: Path, output: Path) -> list[str]:
    """Compare a run's predictions with those of one device.

    Returns:
        What is different: texts at all, and scores by more than 1e-4.
    """
    if not output.exists():
        return [f"{output} is missing"]
    wanted, found = (
        [json.loads(x) for x in f.read_text().splitlines()] for f in (reference, output)
    )
    if [row["id"] for row in wanted] != [row["id"] for row in found]:
        return [f"{len(found)} rows of {len(wanted)}, or in another order"]
    different = [
        a["id"]
        for a, b in zip(wanted, found, strict=True)
        if a.keys() != b.keys() or not all(_is_same(a[key], b[key]) for key in a)
    ]
    return [f"rows {different[:5]} (of {len(different)}) are not as usual"] if different else []


def _is_same(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= SCORES_WITHIN * max(1.0, abs(a))
    return a == b
