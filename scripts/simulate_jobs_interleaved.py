"""Runs random histories of jobs whose processes take turns at every operation on files.

    scripts/simulate_jobs_interleaved.py [--schedules 20000] [--seed 0] [--processes 2]

simulate_jobs.py lets one process at a time do a whole step, such as a commit. Here up to three runs
are anywhere in their openings, commits and ends at once; each is a thread that waits for its turn.
With locks at most one of them is at work, without them the newest is. They ask for the same job,
for another one in its place (--restart), or for failed rows again; they are killed, have full and
failing disks, and the power goes. In the end an undisturbed run finishes the job, and

- every row is once in predictions or errors, in order, with the answer of the job that the plan
  names, and the files are those of an undisturbed run;
- with locks: no row is computed again whose commit had returned, in any run of the same job;
- whenever nobody is at work, a marker stands above files that are whole, and of one job; without
  locks one may be missing, but none is wrong.

A schedule that breaks a promise is printed; its seed repeats it (--schedules 1 --seed SEED).
"""

import argparse
import errno
import json
import sys
import threading
import time
import traceback
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from simulate_jobs_disk import Process, StrictDisk
from simulated_disk import Crash

from moe_lightning.errors import StoppedError, UsageError
from moe_lightning.jobs import Job, JobPlan, LocalStorage, work_units

ROOT = Path("/run")
CHUNK = 50
NUM_ROWS = 6
BAD, FAILS = 5, 3
BATCHES = [np.array([4, 0]), np.array([3, 1]), np.array([2])]
FAULTS = ("crash", "crash", "torn", errno.ENOSPC, errno.EIO)


class BrokenPromiseError(AssertionError):
    """A promise that was broken."""


def answer(version: int, row: int, *, retries: bool) -> tuple[int, bool, str]:
    """What a job of this version says of a row; one fails, unless it is computed again."""
    if row == FAILS and not retries:
        return row, False, json.dumps({"failed": row, "of": version})
    return row, True, json.dumps({"id": row, "of": version})


def input_errors(version: int) -> list[tuple[int, str]]:
    """The row that cannot be read."""
    return [(BAD, json.dumps({"failed": BAD, "of": version}))]


class Run(threading.Thread):
    """One command, in a process of its own.

    Args:
        history: Where it happens.
        version: Of the job that it asks for.
        options: Of ``Job.open``.
        faults: Of its file operations.
    """

    def __init__(self, history: "History", version: int, options: dict, faults: dict) -> None:
        super().__init__(daemon=True)
        self.history = history
        self.version = version
        self.options = options
        self.process = Process(
            history.disk, faults, has_locks=history.has_locks, before=lambda _: self.wait_turn()
        )
        self.turn = threading.Semaphore(0)
        self.problem: BaseException | None = None
        self.ended = "not yet"

    def wait_turn(self) -> None:
        """Let others go on, at random."""
        self.history.pass_turn(self)

    def run(self) -> None:
        self.turn.acquire()
        try:
            self.ended = self._work()
        except Crash:
            self.ended = "crashed"
        except StoppedError:
            self.ended = "stopped"
        except UsageError:
            self.ended = "refused"
        except OSError:
            self.ended = "failed to write"
        except BaseException as error:
            self.problem = error
        self.process.die()
        if self.options.get("restart") and self.ended != "refused":
            self.history.safe.clear()  # it may have forgotten half of the older job
        self.history.back.release()

    def _work(self) -> str:
        plan = JobPlan({"version": self.version}, NUM_ROWS, BATCHES)
        retries = bool(self.options.get("retry_errors"))
        job = Job.open(
            LocalStorage(ROOT, self.process), plan, make_id=self.history.make_id, **self.options
        )
        try:
            if job.is_finished:
                return "was finished"
            safe = self.history.safe.setdefault(job.id, set())
            again = {row for row in safe if not job.is_done_N[row]} - (
                {FAILS} if retries else set()
            )
            if again and self.history.has_locks:
                raise BrokenPromiseError(f"committed rows {sorted(again)} are computed again")
            writer = job.writer()
            for unit in work_units(BATCHES, is_done_N=job.is_done_N):
                rows = [answer(self.version, int(row), retries=retries) for row in unit.rows]
                writer.commit(f"{unit.number:08d}", rows)
                safe.update(unit.rows.tolist())
                self.history.counts["commits"] += 1
            job.finish(lambda: input_errors(self.version))
            return "finished"
        finally:
            job.close()


class History:
    """A history, and who takes part in it.

    Args:
        random: Decides everything.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.disk = StrictDisk(ROOT)
        self.has_locks = random.random() < 0.5
        self.switches = random.choice((0.02, 0.1, 0.4))
        self.safe: dict[str, set[int]] = {}
        self.counts: Counter = Counter()
        self.steps: list[str] = []
        self.runs: list[Run] = []
        self.back = threading.Semaphore(0)

    def run(self) -> None:
        """Let runs come and go, then let one end the job."""
        for _ in range(self.random.randint(1, 6)):
            self._begin()
            if self.random.random() < 0.5:
                self._begin()
            while self.runs and (len(self.runs) > 2 or self.random.random() < 0.8):
                self._let_one_go_on()
            if self.random.random() < 0.15:
                self._cut_the_power()
            if not self.runs:
                self._check()
        while self.runs:
            self._let_one_go_on()
        self._end()

    def make_id(self) -> str:
        """Name a job, by the seed."""
        return f"{self.random.getrandbits(32):08x}"

    def pass_turn(self, run: Run) -> None:
        """Called by a run before each of its operations."""
        if self.random.random() < self.switches:
            self.back.release()
            run.turn.acquire()

    def _begin(self) -> None:
        options = self.random.choice(
            ({}, {}, {}, {"retry_errors": True}, {"restart": True}, {"restart": True})
        )
        version = self.random.choice((1, 1, 2))
        faults = {}
        if self.random.random() < 0.4:
            faults = {self.random.randint(0, 160): self.random.choice(FAULTS)}
        run = Run(self, version, options, faults)
        run.start()
        self.runs.append(run)
        self.steps.append(f"begin {len(self.steps)}: version {version} {options} {faults}")

    def _let_one_go_on(self, *, kills: bool = True) -> None:
        run = self.random.choice(self.runs)
        if kills and self.random.random() < 0.03:
            self.counts["kills"] += 1
            self.steps.append("kill")
            run.process.die()
        run.turn.release()
        self.back.acquire()
        if run.ended == "not yet" and run.problem is None:
            return
        run.join()
        self.runs.remove(run)
        self.counts[f"runs: {run.ended}"] += 1
        self.steps.append(f"{run.version} {run.ended} after {run.process.num_operations}")
        if run.problem is not None:
            raise run.problem

    def _cut_the_power(self) -> None:
        for run in self.runs:
            run.process.die()
        while self.runs:
            self._let_one_go_on(kills=False)
        self.disk.power_cut(self.random)
        self.counts["power cuts"] += 1
        self.steps.append("power cut")

    def _end(self) -> None:
        stored = json.loads(self.disk.content(ROOT / "job/plan.json") or b"null")
        version = 1 if stored is None else stored["identity"]["version"]
        run = Run(self, version, {}, {})
        self.runs.append(run)
        run.start()
        while self.runs:
            self._let_one_go_on(kills=False)
        if run.ended not in ("finished", "was finished"):
            raise BrokenPromiseError(f"the last run {run.ended}")
        self._check(version)

    def _check(self, version: int | None = None) -> None:
        """Whenever nobody is at work: what a marker of the plan's job says is so."""
        marker = json.loads(self.disk.content(ROOT / "_SUCCESS") or b"null")
        plan = json.loads(self.disk.content(ROOT / "job/plan.json") or b"null")
        if marker is None or plan is None or marker["job"] != plan["id"]:
            if version is not None:
                raise BrokenPromiseError("the job is not finished")
            return
        of = plan["identity"]["version"]
        possible = []
        for retries in (False, True):
            rows = [answer(of, row, retries=retries) for row in range(NUM_ROWS) if row != BAD]
            failed = [row for row in rows if not row[1]] + [(BAD, 0, input_errors(of)[0][1])]
            good = "".join(f"{text}\n" for _, is_ok, text in rows if is_ok)
            bad = "".join(f"{text}\n" for _, _, text in sorted(failed))
            possible.append((good.encode(), bad.encode()))
        found = tuple(self.disk.content(ROOT / f"{name}.jsonl") for name in FILES)
        if not self.has_locks and version is None:
            # A run that was to replace the job while it finished may have died when it had removed
            # some of the files. The next one sees that.
            possible += [(good, None) for good, _ in possible] + [
                (None, bad) for _, bad in possible
            ]
            possible.append((None, None))
        if found not in possible:
            raise BrokenPromiseError(f"the files of version {of} are {found}")


FILES = ("predictions", "errors")


def run_schedules(first_and_num: tuple[int, int]) -> tuple[Counter, list[str]]:
    """Run schedules with consecutive seeds; returns what happened, and what went wrong."""
    counts: Counter = Counter()
    problems = []
    first, num = first_and_num
    for seed in range(first, first + num):
        history = History(Random(seed))
        try:
            history.run()
        except Exception:
            steps = "\n  ".join(history.steps)
            locks = "locks" if history.has_locks else "no locks"
            problems.append(f"seed {seed}, {locks}:\n  {steps}\n{traceback.format_exc()}")
            for run in history.runs:  # their threads wait for a turn
                run.process.die()
                run.turn.release()
        counts.update(history.counts)
        counts["schedules"] += 1
        counts["schedules without locks"] += not history.has_locks
    return counts, problems


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schedules", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    begin_s = time.monotonic()
    counts: Counter = Counter()
    problems: list[str] = []
    end = options.seed + options.schedules
    sizes = [(at, min(CHUNK, end - at)) for at in range(options.seed, end, CHUNK)]
    with (
        get_context("spawn").Pool(options.processes) as pool,
        tqdm(total=options.schedules, unit="schedule") as bar,
    ):
        for found, wrong in pool.imap_unordered(run_schedules, sizes):
            counts.update(found)
            problems += wrong
            bar.update(found["schedules"])
    for name in sorted(counts, key=lambda name: -counts[name]):
        print(f"{name:<28}{counts[name]:>12,}")
    print(f"{'seconds':<28}{time.monotonic() - begin_s:>12,.0f}")
    print(f"{'broken promises':<28}{len(problems):>12,}")
    for problem in problems[:5]:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
