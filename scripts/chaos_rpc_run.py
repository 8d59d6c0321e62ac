"""One run of a real master with real workers, what is done to it, and whether it bore that."""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_rpc_nursery import Child, Nursery
from chaos_rpc_plan import Fault, Plan, Stage
from chaos_rpc_team import HandWorker, LocalWorkers, is_alive, wait_until

LOOK_S = 0.005
# The first mark of each stage, and those that end it.
STAGES: dict[Stage, tuple[str, tuple[str, ...]]] = {
    "start": ("", ("met",)),
    "load": ("met", ("ready",)),
    "prefill": ("prefill", ("decode", "prefill", "done")),
    "decode": ("decode", ("prefill", "done")),
    "end": ("done", ("left",)),
}


@dataclass(frozen=True, slots=True)
class Mark:
    """How far the master is: what happened, when, and what it said."""

    name: str
    at_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs have in common.

    Attributes:
        nursery: Where masters are born.
        directory: Where everything goes.
        checkpoint: The model.
        rows: File of the rows.
        num_tokens: How many tokens Generate makes.
        batch_tokens: Tokens of a batch.
        timeout_s: Longest silence of a worker that is not lost.
        join_timeout_s: Longest wait for workers, by the way they start.
    """

    nursery: Nursery
    directory: Path
    checkpoint: str
    rows: Path
    num_tokens: int
    batch_tokens: int
    timeout_s: float
    join_timeout_s: dict[str, float]

    def command(self, task: str, output_dir: Path, *options: object) -> list[str]:
        """The command line of a run."""
        return [
            *("predict", "--model.checkpoint", self.checkpoint, "--output_dir", str(output_dir)),
            *("--data.input", str(self.rows), "--data.max_batch_tokens", str(self.batch_tokens)),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
            *("--model.task", task),
            *(("--model.task.max_new_tokens", str(self.num_tokens)) if task == "Generate" else ()),
            *map(str, options),
        ]


@dataclass(slots=True)
class Strike:
    """A fault that has happened.

    Attributes:
        fault: What.
        at_s: When.
        name: Address of the worker; the master's is empty.
        awake_at_s: When a stopped worker was woken.
    """

    fault: Fault
    at_s: float
    name: str
    awake_at_s: float = float("inf")


@dataclass(slots=True)
class Run:
    """What came of a plan.

    Attributes:
        plan: The plan.
        directory: Its files.
        master: The master's process, which has ended.
        marks: Its marks.
        strikes: The faults that happened; the master may have been done before.
        names: Addresses of the workers.
        orphans_s: How long local workers outlived the master.
    """

    plan: Plan
    directory: Path
    master: Child
    marks: list[Mark] = field(default_factory=list)
    strikes: list[Strike] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    orphans_s: float = 0.0

    @property
    def output(self) -> Path:
        """What the master wrote."""
        return self.directory / "out"

    @property
    def run_s(self) -> float:
        """How long the master was there."""
        return self.master.end_s - self.master.start_s

    def when(self, name: str) -> float:
        """When a mark was made first; infinity if never."""
        return next((mark.at_s for mark in self.marks if mark.name == name), float("inf"))

    def stage(self, stage: Stage) -> list[tuple[float, float]]:
        """Beginnings and ends of a stage; of the first process's begin is the run's."""
        first, last = STAGES[stage]
        begins = [(n, m.at_s) for n, m in enumerate(self.marks) if m.name == first]
        if not first:
            begins = [(-1, self.master.start_s)]
        spans = []
        for number, at_s in begins:
            ends = [m.at_s for m in self.marks[number + 1 :] if m.name in last]
            spans.append((at_s, ends[0] if ends else self.master.end_s))
        return spans

    def lost_at_s(self, strike: Strike) -> float:
        """When the master gave the struck worker up; infinity if it did not."""
        lost = f"worker {strike.name} is lost"
        at_s = (m.at_s for m in self.marks if m.name == "lost" and m.text.startswith(lost))
        return next(at_s, float("inf"))


class Runner:
    """Carries plans out.

    Args:
        setting: What all runs have in common.
        team: Workers that were started by hand.
    """

    def __init__(self, setting: Setting, team: Sequence[HandWorker]) -> None:
        self.setting = setting
        self.team = team

    def carry_out(self, plan: Plan, options: Sequence[object], lengths: "Run | None") -> Run:
        """Start a master and have the plan's faults happen.

        Args:
            plan: The plan.
            options: More options of the master's.
            lengths: A run without faults, by which moments are chosen; None if there are none.

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
        run = Run(plan, directory, master)
        local = LocalWorkers(master)
        victims = _Victims(run, self.team, local)
        limit_s = 60 + join_timeout_s + (5 * lengths.run_s if lengths is not None else 0)
        _attend(run, marks, lengths, victims, limit_s=limit_s)
        run.names = victims.names
        if plan.start == "local":
            wait_until(lambda: not local.alive(), 30)
            run.orphans_s = time.monotonic() - master.end_s if not local.alive() else float("inf")
            for pid in local.alive():
                os.kill(pid, signal.SIGKILL)
        return run


class _Victims:
    """Whom faults strike."""

    def __init__(self, run: Run, team: Sequence[HandWorker], local: LocalWorkers) -> None:
        self._run = run
        self._team = team
        self._local = local
        self._sleeping: dict[int, Strike] = {}
        self.names = {
            n: worker.address
            for n, worker in enumerate(team[: run.plan.num_workers])
            if run.plan.start == "hand"
        }

    def look(self) -> None:
        """See which workers are there, and wake whom it is time to wake."""
        if self._run.plan.start == "local" and len(self.names) < self._run.plan.num_workers:
            self._local.look()
            self.names = {n: self._local.address(n) for n in self._local.pids}
        for pid, strike in list(self._sleeping.items()):
            if time.monotonic() - strike.at_s >= (strike.fault.awake_s or float("inf")):
                del self._sleeping[pid]
                strike.awake_at_s = time.monotonic()
                if is_alive(pid):
                    os.kill(pid, signal.SIGCONT)

    def strike(self, fault: Fault) -> bool:
        """Have a fault happen.

        Returns:
            Whether there was somebody to strike.
        """
        if fault.kind == "kill_master":
            if len(self.names) < self._run.plan.num_workers:
                return False
            self._run.strikes.append(Strike(fault, time.monotonic(), ""))
            self._run.master.send(signal.SIGKILL)
            return True
        if fault.worker not in self.names:
            return False
        is_local = self._run.plan.start == "local"
        if is_local:
            pid = self._local.pids[fault.worker]
        else:
            pid = self._team[fault.worker].child.pid
        if not is_alive(pid):
            return not self._run.master.is_there
        strike = Strike(fault, time.monotonic(), self.names[fault.worker])
        self._run.strikes.append(strike)
        os.kill(pid, signal.SIGSTOP if fault.kind == "stop" else signal.SIGKILL)
        if fault.kind == "stop" and fault.awake_s is not None:
            self._sleeping[pid] = strike
        if fault.kind == "restart":
            worker = self._team[fault.worker]
            worker.kill()
            worker.start()
        return True


def _attend(
    run: Run, marks: Path, lengths: Run | None, victims: _Victims, *, limit_s: float
) -> None:
    """Be there until the master has ended, and strike when it is time."""
    waiting = list(run.plan.faults)
    due: Callable[[Fault], float] = lambda fault: _due_s(run, fault, lengths)  # noqa: E731
    while run.master.is_there:
        run.marks = _read(marks)
        victims.look()
        if waiting and time.monotonic() >= due(waiting[0]) and victims.strike(waiting[0]):
            waiting.pop(0)
        if time.monotonic() - run.master.start_s > limit_s:
            run.master.end()
        time.sleep(LOOK_S)
    run.marks = _read(marks)
    # Who is to be woken is, even if nobody waits for him any more.
    wait_until(lambda: bool(victims.look()) or not victims._sleeping, 600)


def _due_s(run: Run, fault: Fault, lengths: Run | None) -> float:
    """When a fault is to happen; infinity as long as its stage has not begun."""
    if lengths is None:
        return float("inf")
    usual = lengths.stage(fault.stage)
    turn = min(int(fault.turn * len(usual)), len(usual) - 1)
    begun = run.stage(fault.stage)
    if turn >= len(begun):
        return float("inf")
    begin_s, end_s = usual[turn]
    return begun[turn][0] + fault.fraction * (end_s - begin_s)


def _read(path: Path) -> list[Mark]:
    if not path.exists():
        return []
    whole, _, _unfinished = path.read_text().rpartition("\n")
    said: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
    return [Mark(**each) for each in said]
