"""One random history of a job: runs that begin, commit, crash, come back from the dead, and finish.

After each step what the job promises is checked: a finished job has each row exactly once, with the
right answer, in order; what was committed is never computed again; a run that a newer one has taken
over from can change nothing.
"""

import errno
import hashlib
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from simulated_disk import Crash, Disk, Process

from moe_lightning.errors import StoppedError, UsageError
from moe_lightning.jobs import Job, JobPlan, LocalStorage, work_units
from moe_lightning.jobs.epochs import epoch_name, newest_epoch
from moe_lightning.jobs.ledger import PartEntry, encode

ROOT = Path("/run")
NUM_RANKS = 3
FAULTS = ("crash", "torn", errno.ENOSPC, errno.EIO)


class BrokenPromiseError(AssertionError):
    """A promise that was broken."""


class Run:
    """A process that is at work on the job, or thinks so."""

    def __init__(self, process, job, units):
        self.process = process
        self.job = job
        self.units = units
        self.writers = [job.writer(rank) for rank in range(NUM_RANKS)]
        self.computed = {}
        self.done = []

    @property
    def is_superseded(self):
        """Whether another run has taken over, or has forgotten the job."""
        return newest_epoch(self.job.storage, self.job.folder) != self.job.epoch


class History:
    """A history, step by step.

    Args:
        random: Decides everything.

    Attributes:
        counts: What happened, by its name.
        steps: The same in order, for whoever looks for the cause of a violation.
    """

    def __init__(self, random):
        self.random = random
        self.disk = Disk()
        self.has_locks = random.random() < 0.5
        self.runs = []
        self._damaged = set()
        self._is_half_forgotten = False
        self.begun = {}
        self.safe = set()
        self.id = None
        self.counts = Counter()
        self.steps = []
        num_rows = random.randint(0, 9)
        rows = list(range(num_rows))
        self.bad = {row for row in rows if random.random() < 0.15}
        self.flaky = {row for row in rows if random.random() < 0.2}
        good = [row for row in rows if row not in self.bad]
        random.shuffle(good)
        batches = []
        while good:
            size = random.randint(1, 3)
            batches.append(np.array(good[:size]))
            good = good[size:]
        self.plan = JobPlan({"seed": 7}, num_rows, batches)

    def run(self, num_steps):
        """Take so many random steps, then let an undisturbed run end the job, and check it."""
        for _ in range(num_steps):
            self.step(self.random.choice(STEPS))
        for run in self.runs:
            run.process.die()
        self.runs.clear()
        self._begin(faults=False)
        run = self.runs[0]
        while run.units:
            self._commit(run)
        if not run.job.is_finished:
            run.job.finish(self._input_errors)
        run.job.close()
        self.check()
        if self._success() is None:
            raise BrokenPromiseError("the job is not finished")

    def step(self, name):
        """Take one step."""
        self.steps.append(name)
        with suppress(Crash):
            getattr(self, f"_{name}")()
        self.runs = [run for run in self.runs if not run.process.is_dead]
        self.check()

    # Steps.

    def _begin(self, *, faults=True, **options):
        process = Process(self.disk, has_locks=self.has_locks)
        if faults and self.random.random() < 0.3:
            process.faults[self.random.randint(0, 40)] = self.random.choice(FAULTS)
        busy = self.has_locks and bool(self.disk.locks)
        try:
            job = Job.open(LocalStorage(ROOT, process), self.plan, make_id=self._make_id, **options)
        except UsageError:
            process.die()
            if not busy:
                raise BrokenPromiseError("the job is refused, but nobody has it") from None
            self.counts["refused starts"] += 1
            return
        except OSError:
            process.die()
            self._forget_if_replaced()
            return
        except Crash:
            self._forget_if_replaced()
            raise
        if busy:
            raise BrokenPromiseError("two runs have the lock")
        self.counts["runs"] += 1
        if not job.is_finished:
            self.begun[job.id] = job.epoch
        self._forget_if_replaced()
        missing = {row for row in self.safe if not job.is_done_N[row]}
        if options.get("retry_errors"):
            missing -= self.flaky
        if missing:
            raise BrokenPromiseError(f"committed rows {sorted(missing)} are to be computed again")
        units = work_units(
            self.plan.batches,
            num_ranks=self.random.randint(1, NUM_RANKS),
            is_done_N=job.is_done_N,
        )
        self.random.shuffle(units)
        self.runs.append(Run(process, job, units))

    def _make_id(self):
        return f"{self.random.getrandbits(32):08x}"

    def _forget_if_replaced(self):
        """What was committed to a job that was forgotten (--restart) is no longer safe."""
        stored = self.disk.content(ROOT / "job/plan.json")
        id = json.loads(stored)["id"] if stored else None
        if id != self.id:
            self.id, self.safe = id, set()

    def _begin_anew(self):
        if self.random.random() < 0.3:
            if not (self.has_locks and self.disk.locks):
                # It may crash when it has forgotten half of the job, which another run is at.
                self.safe, self._is_half_forgotten = set(), True
            self._begin(restart=True)

    def _begin_to_retry(self):
        self._begin(retry_errors=True)

    def _commit_something(self):
        for run in self._some_run():
            if run.units:
                self._commit(run)

    def _commit(self, run):
        unit = run.units.pop()
        was_superseded = run.is_superseded
        # Who computed a unit commits it, until it is done.
        first = (self.random.choice(run.writers), [self._answer(int(row)) for row in unit.rows])
        writer, rows = run.computed.setdefault(unit.number, first)
        try:
            writer.commit(f"{unit.number:08d}", rows)
        except StoppedError:
            if not was_superseded:
                raise BrokenPromiseError("a run is stopped that nobody took over from") from None
            self.counts["zombies' commits refused"] += 1
            run.process.die()
            return
        except OSError:
            self.counts["failed writes"] += 1
            run.units.append(unit)
            if self.random.random() < 0.5:
                run.process.die()
            return
        if was_superseded:
            raise BrokenPromiseError("a zombie has committed")
        self.counts["commits"] += 1
        run.done.append((writer, f"{unit.number:08d}", rows))
        if run.job.id == self.id:
            self.safe |= {row for row, _, _ in rows}

    def _commit_the_same_again(self):
        for run in self._some_run():
            if run.done and not run.is_superseded:
                writer, name, rows = self.random.choice(run.done)
                try:
                    writer.commit(name, rows)
                    self.counts["commits of the same"] += 1
                except OSError:
                    run.process.die()

    def _write_as_a_zombie(self):
        """A commit that passed the check of the epoch just before the newer run began."""
        for run in self._some_run():
            # A run whose claim came to nothing, because the disk failed, took over from nobody, and
            # the epochs of a finished job are forgotten: what comes then is a right answer too.
            newest = self.begun.get(run.job.id, 0)
            claim = ROOT / epoch_name(run.job.folder, newest)
            if newest > run.job.epoch > 0 and self.disk.find(claim) is not None:
                content = "".join(f'{row}\tok\t{{"id": "zombie"}}\n' for row in self.safe or {0})
                name = f"{run.job.folder}/parts/{run.job.epoch:06d}-zombie.part"
                entry = PartEntry(name, len(content), _sha256(content.encode()), 1, 0)
                rank = self.random.randrange(NUM_RANKS)
                log = f"{run.job.folder}/ledger/{run.job.epoch:06d}-{rank:05d}.jsonl"
                with suppress(OSError):
                    run.job.storage.write(name, content.encode())
                    run.job.storage.append(log, encode(entry))
                    self.counts["zombies' late lines"] += 1

    def _kill(self):
        for run in self._some_run():
            run.process.die()
            self.counts["kills"] += 1

    def _crash_soon(self):
        for run in self._some_run():
            number = run.process.num_operations + self.random.randint(0, 12)
            run.process.faults[number] = self.random.choice(FAULTS)

    def _cut_the_power(self):
        for run in self.runs:
            run.process.die()
        self.disk.power_cut(self.random)
        self.counts["power cuts"] += 1
        self._forget_if_replaced()

    def _finish(self):
        for run in self._some_run():
            if run.units:
                continue
            was_superseded = run.is_superseded
            try:
                run.job.finish(self._input_errors)
                run.job.close()
                self.counts["finished"] += 1
            except StoppedError:
                if not (was_superseded or self._damaged or self._is_half_forgotten):
                    raise BrokenPromiseError("a run cannot finish what it has done") from None
            except OSError:
                pass
            run.process.die()

    def _damage_a_part(self):
        parts = [name for name in sorted(self.disk.files()) if name.endswith(".part")]
        if not parts or self.random.random() < 0.5:
            return
        path = Path(self.random.choice(parts))
        inode = self.disk.find(path)
        if path.name in self._damaged:
            return
        self._damaged.add(path.name)
        self.counts["damaged parts"] += 1
        self.safe -= {int(line.split(b"\t")[0]) for line in inode.data.splitlines()}
        if self.random.random() < 0.5 and inode.data:
            at = self.random.randrange(len(inode.data))
            inode.data = inode.data[:at] + bytes([inode.data[at] ^ 1]) + inode.data[at + 1 :]
            inode.synced = inode.data
        else:
            for names in (self.disk.names, self.disk.synced_names):
                names[str(path.parent)].pop(path.name, None)
            changes = self.disk.changes[str(path.parent)]
            changes[:] = [change for change in changes if change[0] != path.name]

    # What holds at any time.

    def check(self):
        """Raise BrokenPromiseError if a finished job is not what it should be."""
        if self._success() is None:
            return
        predictions = _lines(self.disk.content(ROOT / "predictions.jsonl"))
        errors = _lines(self.disk.content(ROOT / "errors.jsonl"))
        rows = [row["id"] for row in predictions]
        failed = [row["failed"] for row in errors]
        if rows != sorted(rows) or failed != sorted(failed):
            raise BrokenPromiseError("the rows are out of order")
        if sorted(rows + failed) != list(range(self.plan.num_rows or 0)):
            raise BrokenPromiseError(f"rows {rows} and errors {failed} are not each row once")
        if not self.bad <= set(failed) or set(failed) - self.bad - self.flaky:
            raise BrokenPromiseError("rows failed that did not, or the other way round")

    def _success(self):
        """The marker, if it is that of the job."""
        marker = self.disk.content(ROOT / "_SUCCESS")
        plan = self.disk.content(ROOT / "job/plan.json")
        if not marker or not plan:
            return None
        found = json.loads(marker)
        return found if found["job"] == json.loads(plan)["id"] else None

    def _answer(self, row):
        if row in self.flaky and self.random.random() < 0.5:
            return row, False, json.dumps({"failed": row})
        return row, True, json.dumps({"id": row})

    def _input_errors(self):
        for row in sorted(self.bad):
            yield row, json.dumps({"failed": row})

    def _some_run(self):
        return [self.random.choice(self.runs)] if self.runs else []


STEPS = (
    *("begin",) * 4,
    *("commit_something",) * 10,
    *("finish",) * 3,
    *("write_as_a_zombie",) * 2,
    "begin_anew",
    "begin_to_retry",
    "commit_the_same_again",
    "kill",
    "crash_soon",
    "cut_the_power",
    "damage_a_part",
)


def _lines(content):
    return [json.loads(line) for line in (content or b"").splitlines()]


def _sha256(content):
    return hashlib.sha256(content).hexdigest()
