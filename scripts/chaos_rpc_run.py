"""One run of a real master with real workers, and what is done to it."""

import json
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from chaos_rpc_plan import Fault, Kind, Plan
from chaos_rpc_record import Mark, Run, Setting, Strike
from chaos_rpc_team import HandWorker, LocalWorkers, is_alive, wait_until

LOOK_S = 0.005
BETWEEN_SIGNALS_S = 1.2  # sooner ones are taken for one
_SIGNALS: dict[Kind, signal.Signals] = {
    "kill": signal.SIGKILL,
    "restart": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "kill_master": signal.SIGKILL,
    "nap_master": signal.SIGSTOP,
    "interrupt": signal.SIGINT,
    "interrupt_twice": signal.SIGINT,
}


class Runner:
    """Carries plans out.

    Args:
        setting: What all runs have in common.
        team: Workers that were started by hand.
    """

    def __init__(self, setting: Setting, team: Sequence[HandWorker]) -> None:
        self.setting = setting
        self.team = team

    def carry_out(self, plan: Plan, options: Sequence[object], usual: Run | None) -> Run:
        """Start a master and have the plan's faults happen.

        Args:
            plan: The plan.
            options: More options of the master's.
            usual: A run without faults, by which moments are chosen; None if there are none.

        Returns:
            What came of it. Stopped workers that were to be woken later still sleep.
        """
        setting = self.setting
        directory = setting.directory / f"{plan.number:03d}"
        directory.mkdir()
        join_timeout_s = setting.join_timeout_s[plan.start]
        strategy = [
            *("--trainer.strategy", "chaos_rpc_master.WatchedRPCStrategy"),
            *("--trainer.strategy.transport", plan.transport),
            *("--trainer.strategy.timeout_s", setting.timeout_s),
            *("--trainer.strategy.join_timeout_s", join_timeout_s),
        ]
        if plan.start == "hand":
            addresses = json.dumps([worker.address for worker in self.team[: plan.num_workers]])
            strategy += ["--trainer.strategy.workers", addresses]
        else:
            strategy += ["--trainer.strategy.num_workers", plan.num_workers]
        command = setting.command(plan.task, directory / "out", *strategy, *options)
        marks = directory / "marks"
        master = setting.nursery.start(
            command, log=directory / "master.log", environ={"CHAOS_MARKS": str(marks)}
        )
        run = Run(plan, directory, master, num_freed=[worker.num_freed for worker in self.team])
        local = LocalWorkers(master)
        victims = _Victims(run, self.team, local)
        limit_s = 60 + join_timeout_s + (5 * usual.run_s if usual is not None else 0)
        _attend(run, marks, usual, victims, limit_s=limit_s)
        if plan.start == "local":
            wait_until(lambda: not local.alive(), 30)
            run.orphans_s = time.monotonic() - master.end_s if not local.alive() else math.inf
            for pid in local.alive():
                os.kill(pid, signal.SIGKILL)
        # Who is to be woken is, even if nobody waits for him any more.
        wait_until(victims.follow_up, math.inf)
        if run.bytes_before is not None:
            run.bytes_after = victims.bytes_read(plan.faults[0].worker)
        return run


class _Victims:
    """Whom faults strike."""

    def __init__(self, run: Run, team: Sequence[HandWorker], local: LocalWorkers) -> None:
        self._run = run
        self._team = team
        self._local = local
        self._is_local = run.plan.start == "local"
        self._later: list[tuple[float, int, Strike]] = []
        if not self._is_local:
            run.names = {n: each.address for n, each in enumerate(team[: run.plan.num_workers])}

    def look(self) -> None:
        """See which workers are there."""
        if self._is_local and len(self._run.names) < self._run.plan.num_workers:
            self._local.look()
            self._run.names = {n: self._local.address(n) for n in self._local.pids}

    def follow_up(self) -> bool:
        """Wake whom it is time to wake, and interrupt again.

        Returns:
            Whether all that has been done.
        """
        for at_s, pid, strike in list(self._later):
            if time.monotonic() >= at_s:
                self._later.remove((at_s, pid, strike))
                if strike.fault.awake_s is not None:
                    strike.awake_at_s = time.monotonic()
                if is_alive(pid):
                    again = strike.fault.kind == "interrupt_twice"
                    os.kill(pid, signal.SIGINT if again else signal.SIGCONT)
        return not self._later

    def _counts_bytes(self) -> bool:
        plan = self._run.plan
        is_loaded = any(mark.name == "ready" for mark in self._run.marks)
        is_about_one = len(plan.faults) == 1 and not plan.faults[0].is_masters
        return not self._is_local and is_loaded and is_about_one and plan.num_workers > 1

    def bytes_read(self, but: int) -> int:
        """Bytes of weights that all workers but one have read."""
        team = self._team[: self._run.plan.num_workers]
        return sum(worker.bytes_read() for n, worker in enumerate(team) if n != but)

    def strike(self, fault: Fault) -> bool:
        """Have a fault happen.

        Returns:
            Whether there was somebody to strike.
        """
        run = self._run
        if not fault.is_masters and fault.worker not in run.names:
            return False
        if fault.is_masters:
            pid = run.master.pid
        elif self._is_local:
            pid = self._local.pids[fault.worker]
        else:
            pid = self._team[fault.worker].child.pid
        if not is_alive(pid):
            return False
        if self._counts_bytes():
            run.bytes_before = self.bytes_read(fault.worker)
        name = "" if fault.is_masters else run.names[fault.worker]
        strike = Strike(fault, time.monotonic(), name)
        run.strikes.append(strike)
        os.kill(pid, _SIGNALS[fault.kind])
        if fault.awake_s is not None:
            self._later.append((strike.at_s + fault.awake_s, pid, strike))
        if fault.kind == "interrupt_twice":
            self._later.append((strike.at_s + BETWEEN_SIGNALS_S, pid, strike))
        if fault.kind == "restart":
            self._team[fault.worker].kill()
            self._team[fault.worker].start()
        return True


def _attend(run: Run, marks: Path, usual: Run | None, victims: _Victims, *, limit_s: float) -> None:
    """Be there until the master has ended, and strike when it is time."""
    waiting = list(run.plan.faults)
    while run.master.is_there:
        run.marks = _read(marks)
        run.waits += _wait_for_a_core(run.master.pid)
        victims.look()
        victims.follow_up()
        is_due = waiting and time.monotonic() >= _due_s(run, waiting[0], usual)
        if is_due and victims.strike(waiting[0]):
            waiting.pop(0)
        if time.monotonic() - run.master.start_s > limit_s:
            run.master.end()
        time.sleep(LOOK_S)
    run.marks = _read(marks)


def _due_s(run: Run, fault: Fault, usual: Run | None) -> float:
    """When a fault is to happen; infinity as long as its stage has not begun."""
    assert usual is not None, "who strikes must know when"
    spans, begun = usual.stage(fault.stage), run.stage(fault.stage)
    turn = min(int(fault.turn * len(spans)), len(spans) - 1)
    if turn >= len(begun):
        return math.inf
    begin_s, end_s = spans[turn]
    return begun[turn][0] + fault.fraction * (end_s - begin_s)


def _wait_for_a_core(pid: int) -> list[tuple[float, float]]:
    try:
        waited_ns = int(Path(f"/proc/{pid}/schedstat").read_text().split()[1])
    except (OSError, IndexError):  # gone, or a kernel that does not count
        return []
    return [(time.monotonic(), waited_ns / 1e9)]


def _read(path: Path) -> list[Mark]:
    if not path.exists():
        return []
    whole, _, _unfinished = path.read_text().rpartition("\n")
    return [Mark(**json.loads(line)) for line in whole.splitlines()]
