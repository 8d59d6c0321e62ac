"""Whether a predict job bore what was done to it."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from chaos_job_plan import Strike
from chaos_job_scene import NUM_RANKS, Usual
from chaos_job_watch import JobFiles, Stage, ledger

INTERRUPTED_S = 15.0
GIVEN_UP_S = 60.0  # timeouts, graces and a busy machine
OUTPUT = {"predictions.jsonl", "run.json", "config.yaml", "_SUCCESS", "job"}
CODES = {"master": {-9}, "group": {-9}, "two ranks": {-9}, "master and one": {-9}}


@dataclass(slots=True)
class Ending:
    """How a start of the command ended.

    Attributes:
        strike: What was to happen to it, if anything.
        stage: Stage in which that happened; None if it was over before.
        num_rows_unbegun: Rows that nobody had begun to compute then.
        is_finished: Whether the job was finished then.
        code: Its exit code.
        after_s: How long after the strike it ended, or after its start.
        orphans_s: How long the processes it made outlived it.
        left: Those that had to be killed: their command lines.
        num_rows_redone: Rows that it had begun to compute and that the next one must.
        said: What it said.
        has_hung: Whether it had to be ended.
    """

    strike: Strike | None
    stage: Stage | None = None
    num_rows_unbegun: int = 0
    is_finished: bool = False
    code: int | None = None
    after_s: float = 0.0
    orphans_s: float = 0.0
    left: str = ""
    num_rows_redone: int = 0
    said: str = ""
    has_hung: bool = False

    def __str__(self) -> str:
        what = "undisturbed"
        if self.strike is not None:
            what = f"{self.strike} ({self.stage or 'over before'})"
        return f"{what} -> {self.code} after {self.after_s:.1f} s"


def judge_ending(ending: Ending, usual: Usual) -> list[str]:
    """What is wrong with how a start ended.

    Args:
        ending: How.
        usual: An undisturbed run.

    Returns:
        What must not be.
    """
    strike, problems = ending.strike, []
    if ending.has_hung:
        return [f"{ending}: it had to be ended; it said: {ending.said[-1500:]}"]
    if ending.left:
        problems.append(f"{ending}: left alive: {ending.left}")
    if "Traceback" in ending.said:
        problems.append(f"{ending}: it said a traceback: {ending.said[-3000:]}")
    wanted, limit_s = {0}, GIVEN_UP_S
    if strike is not None and ending.stage is not None:
        if strike.signal != "KILL":
            wanted, limit_s = {5}, INTERRUPTED_S
            if ending.num_rows_unbegun <= NUM_RANKS * usual.most_rows:  # the last batch, or later
                wanted = {0, 5}
            if ending.is_finished and strike.signal == "TERM":  # the interpreter may be ending
                wanted.add(-15)
        elif strike.victim in CODES:
            wanted = CODES[strike.victim]
        elif strike.victim == "worker":
            wanted = {0, 6}
        else:
            wanted = {0, 6} if ending.stage == "merging" else {6}
        if ending.code == 0:
            limit_s += usual.length_s
        if ending.after_s > limit_s:
            problems.append(f"{ending}: more than {limit_s:.0f} s")
    if ending.code not in wanted:
        said = ending.said[-1500:]
        problems.append(f"{ending}: exit code {ending.code}, not one of {wanted}; it said: {said}")
    return problems


def judge_rows(
    before: Sequence[int], done: Sequence[int], lost: Sequence[int], *, is_hurried: bool
) -> list[str]:
    """What is wrong with the ledger after a start that did not finish the job.

    Args:
        before: Rows in the ledger before.
        done: Rows in it now.
        lost: How many batches each rank began that are not there.
        is_hurried: Whether an old rank may have added lines that nobody counts.

    Returns:
        What must not be.
    """
    problems = []
    twice = [row for row, count in Counter(done).items() if count > 1]
    if twice and not is_hurried:
        problems.append(f"computed twice: rows {twice[:10]}, {len(twice)} in all")
    if missing := set(before) - set(done):
        problems.append(f"{len(missing)} rows were in the ledger and are not any more")
    if any(num > 1 for num in lost):
        problems.append(f"more than one batch of a rank is lost: {list(lost)}")
    return problems


def judge_outcome(files: JobFiles, usual: Usual, done: Sequence[int]) -> list[str]:
    """What is wrong with a finished job.

    Args:
        files: Its files.
        usual: An undisturbed run.
        done: Rows in the ledger before the last start.

    Returns:
        What must not be.
    """
    problems, output, num_rows = [], files.output, files.num_rows
    found = (output / "predictions.jsonl").read_bytes()
    if found != usual.predictions:
        problems.append("predictions.jsonl is not that of an undisturbed run")
    ids = Counter(json.loads(line)["id"] for line in found.splitlines())
    if ids != Counter(range(num_rows)):
        problems.append(f"{len(ids)} of {num_rows} ids, or one of them more than once")
    names = {path.name for path in output.iterdir()} - {"placement.json"}
    if names | {"run.json"} != OUTPUT:
        problems.append(f"files are {sorted(names)}")
    success = json.loads((output / "_SUCCESS").read_text())
    counts = {"num_rows": num_rows, "num_predictions": num_rows, "num_errors": 0}
    if success["counts"] != counts:
        problems.append(f"_SUCCESS counts {success['counts']}")
    job = {str(path.relative_to(output)) for path in output.glob("job/**/*")}
    # An empty folder of temporary files hurts nobody.
    if "job/plan.json" not in job or job - {"job/plan.json", "job/lock", "job/tmp"}:
        problems.append(f"job/ holds {sorted(job)}; its ledger has {len(ledger(output))} lines")
    if len(done) == num_rows:
        return problems  # the start that finished it may have died before it wrote run.json
    before = json.loads((output / "run.json").read_text())["num_done_before"]
    if before < len(done):
        problems.append(f"{len(done)} rows were in the ledger, of which {before} were used")
    return problems
