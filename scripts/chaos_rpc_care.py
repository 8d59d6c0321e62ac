"""Looking after workers that were started by hand, once a run is over: who is dead is replaced, who
sleeps is woken, and whoever was left by his master must notice that and be free for the next one.
"""

import math
import signal
import time
from collections.abc import Sequence

from chaos_rpc_record import Run, Setting, Strike
from chaos_rpc_team import HandWorker, wait_until

NOTICES_WITHIN_S = 3.0  # beyond the silence that it has to wait for


def look_after(run: Run, setting: Setting, team: Sequence[HandWorker]) -> list[str]:
    """Make sure that the next master finds the workers as they should be.

    Args:
        run: The run that has ended.
        setting: What all runs have in common.
        team: The workers; the first ones took part.

    Returns:
        What must not be.
    """
    struck = {s.fault.worker: s for s in run.strikes if not s.fault.is_masters}
    violations = []
    for number, worker in enumerate(team[: run.plan.num_workers]):
        strike = struck.get(number)
        if strike is not None and strike.fault.kind == "restart":
            continue
        if strike is not None and strike.fault.kind == "kill":
            worker.kill()
            worker.start()
            continue
        if strike is not None and strike.awake_at_s == math.inf:
            worker.child.send(signal.SIGCONT)
            strike.awake_at_s = time.monotonic()
        if not worker.child.is_there:
            violations.append(f"{worker.address} ended with exit code {worker.child.code}")
            worker.start()
            continue
        violations += _wait_until_free(run, setting, worker, number, strike)
    return violations


def _wait_until_free(
    run: Run, setting: Setting, worker: HandWorker, number: int, strike: Strike | None
) -> list[str]:
    """Wait until a worker that is alive has no master."""
    killed_at_s = next((s.at_s for s in run.strikes if s.fault.kind == "kill_master"), math.inf)
    if killed_at_s < math.inf:
        is_left = run.when("met") < killed_at_s < run.when("done")
        since_s = run.master.end_s
    elif strike is not None and strike.awake_at_s > min(run.when("done"), run.master.end_s):
        # Given up, or asleep when the master said that it was done; then it may have read that.
        is_left = run.lost_at_s(strike) < run.when("done")
        since_s = strike.awake_at_s
    elif strike is not None and run.lost_at_s(strike) < math.inf:
        is_left, since_s = True, strike.awake_at_s
    elif any(s.fault.kind == "interrupt_twice" for s in run.strikes):
        is_left, since_s = False, run.master.end_s  # there may have been no time for a word
    else:
        return []
    until_s = since_s + setting.timeout_s * 1.1 + NOTICES_WITHIN_S
    left_s = max(0.0, until_s - time.monotonic())
    is_free = wait_until(lambda: worker.num_freed > run.num_freed[number], left_s)
    if is_left and not is_free:
        return [f"{worker.address} did not notice that its master had left it"]
    return []
