"""What came of a run: where everything is, how far the master was when, and what struck it."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from chaos_rpc_nursery import Child, Nursery
from chaos_rpc_plan import Fault, Plan, Stage

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
    awake_at_s: float = math.inf


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
        waits: How long the master had waited for a core, and when; both in seconds.
        num_freed: How often each worker started by hand had given up a master before.
        bytes_before: Bytes that the others had read when the first fault happened.
        bytes_after: And after the run.
    """

    plan: Plan
    directory: Path
    master: Child
    marks: list[Mark] = field(default_factory=list)
    strikes: list[Strike] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    orphans_s: float = 0.0
    waits: list[tuple[float, float]] = field(default_factory=list)
    num_freed: list[int] = field(default_factory=list)
    bytes_before: int | None = None
    bytes_after: int | None = None

    @property
    def output(self) -> Path:
        """What the master wrote."""
        return self.directory / "out"

    @property
    def run_s(self) -> float:
        """How long the master was there."""
        return self.master.end_s - self.master.start_s

    def waited_s(self, since_s: float = 0.0, until_s: float = math.inf) -> float:
        """How long the master waited for a core during a time: on a busy machine it is late."""
        before = [wait_s for at_s, wait_s in self.waits if at_s <= since_s]
        until = [wait_s for at_s, wait_s in self.waits if at_s <= until_s]
        return until[-1] - (before[-1] if before else 0.0) if until else 0.0

    def when(self, name: str) -> float:
        """When a mark was made first; infinity if never."""
        return next((mark.at_s for mark in self.marks if mark.name == name), math.inf)

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
        return next(at_s, math.inf)
