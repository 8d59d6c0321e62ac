"""What disturbed predict jobs have in common: checkpoint, rows, commands, undisturbed runs."""

import json
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from chaos_job_marks import MARKS
from chaos_job_plan import Strategy
from chaos_job_processes import RUN_OF, new_token, processes_of
from chaos_job_watch import JobFiles, Stage
from chaos_rpc_nursery import Child, Nursery

from moe_lightning.demo.random_checkpoint import make_checkpoint

NUM_ROWS = 240
NUM_WORKERS = NUM_RANKS = 2
RUN_S = 180.0  # of an undisturbed run, on a busy machine
LOOK_S = 0.002
TIMEOUT_S = 20  # of ranks and workers: a busy machine must not look like a dead one
OPTIONS: dict[Strategy, tuple[object, ...]] = {
    "single": (),
    "placement": (
        *("--trainer.strategy", "moe_placement", "--trainer.strategy.slots", "[cpu,cpu]"),
    ),
    "rpc": (
        *("--trainer.strategy", "moe_rpc", "--trainer.strategy.num_workers", NUM_WORKERS),
        *("--trainer.strategy.timeout_s", TIMEOUT_S, "--trainer.strategy.join_timeout_s", 60),
    ),
    "fsdp": (
        *("--trainer.devices", NUM_RANKS, "--trainer.strategy", "moe_fsdp"),
        *("--trainer.strategy.timeout_s", TIMEOUT_S),
    ),
}


@dataclass(frozen=True, slots=True)
class Usual:
    """An undisturbed run.

    Attributes:
        predictions: What it gave.
        num_parts: How many parts it had.
        most_rows: Rows of the largest.
        length_s: How long it took.
        stages_s: How long each stage took.
    """

    predictions: bytes
    num_parts: int
    most_rows: int
    length_s: float
    stages_s: dict[Stage, float]

    def __str__(self) -> str:
        stages = ", ".join(f"{stage} {s:.1f} s" for stage, s in self.stages_s.items())
        return f"{self.num_parts} batches, {self.length_s:.1f} s: {stages}"


@dataclass(slots=True)
class Start:
    """The command, started.

    Attributes:
        token: Carried by all that its first process starts.
        master: Its first process.
        files: The job it works on.
        marks: File of the batches that it begins.
    """

    token: str
    master: Child
    files: JobFiles
    marks: Path

    def others(self) -> dict[int, str]:
        """The processes it made that are there: number and command line."""
        return processes_of(self.token)


class Scene:
    """A checkpoint, rows, and starts of the command.

    Args:
        directory: Where all of it goes.
        nursery: Where processes are born.
    """

    def __init__(self, directory: Path, nursery: Nursery) -> None:
        self.directory = directory
        self.nursery = nursery
        self.tokens: list[str] = []  # of all starts
        self.checkpoint = make_checkpoint(
            directory / "checkpoint",
            family="qwen3_moe",
            hidden_size=32,
            num_layers=2,
            num_experts=6,
            top_k=2,
            expert_size=16,
            num_heads=4,
            num_kv_heads=2,
            vocab_size=512,
            max_positions=128,
        )
        rows = [{"id": n, "prompt": f"row {n} " + "so " * (n % 9)} for n in range(NUM_ROWS)]
        (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self, strategy: Strategy, name: str, output: Path) -> Start:
        """Start the command.

        Args:
            strategy: Its strategy.
            name: Names its log and its marks, in the directory of the output.
            output: Its --output_dir.

        Returns:
            The start.
        """
        files = JobFiles(output, NUM_ROWS)
        files.begin()
        token = new_token()
        self.tokens.append(token)
        marks = output.parent / f"{name}.marks"
        arguments = (
            *("predict", "--model.checkpoint", self.checkpoint, "--output_dir", output),
            *("--data.input", self.directory / "rows.jsonl", "--data.max_batch_tokens", 256),
            *("--model.task.max_new_tokens", 10, "--model.task.rows_factor", 1),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
            *("--trainer.callbacks", "chaos_job_marks.BatchMarks"),
            *OPTIONS[strategy],
        )
        environ = {RUN_OF: token, MARKS: str(marks)}
        log = output.parent / f"{name}.log"
        master = self.nursery.start(arguments, log=log, environ=environ)
        files.begun_s["planning"] = master.start_s
        return Start(token, master, files, marks)

    def usual(self, strategy: Strategy) -> Usual:
        """Run undisturbed.

        Args:
            strategy: Of the command.

        Returns:
            What came of it.

        Raises:
            AssertionError: If it did not end as it should.
        """
        directory = self.directory / f"usual-{strategy}"
        directory.mkdir()
        start = self.start(strategy, "usual", directory / "out")
        master, files = start.master, start.files
        while master.is_there and time.monotonic() < master.start_s + RUN_S:
            files.look()
            time.sleep(LOOK_S)
        if master.code != 0:
            raise AssertionError(f"undisturbed {strategy}: {master.code}: {master.said()[-3000:]}")
        begun = [*files.begun_s.items(), ("", master.end_s)]
        lengths = {name: next_s - s for (name, s), (_, next_s) in pairwise(begun)}
        predictions = (directory / "out" / "predictions.jsonl").read_bytes()
        length_s = master.end_s - master.start_s
        return Usual(predictions, files.num_lines, files.most_rows, length_s, lengths)
