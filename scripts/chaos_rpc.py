"""Kill and stop workers and masters of real ``moe_rpc`` runs at random moments, and see what comes.

    python scripts/chaos_rpc.py --runs 200 --seed 1 --json chaos.json
    python scripts/chaos_rpc.py --seed 1 --only "[17]"                  # one of them again
    python scripts/chaos_rpc.py --faults kill,stop --transport zmq --starts hand

Each run is a master (``python -m moe_lightning predict``) with workers that it started itself, or
that were started by hand and serve run after run, and what its plan says happens to it (see
chaos_rpc_plan.py): SIGKILL or SIGSTOP, SIGCONT after a while or after the run, a new worker at the
address of a dead one. Moments are drawn as shares of the stages of a run without faults.

A run must end with exit code 0 and the rows of one device, in bounded time; a worker that is killed
must be given up within 1 s, one that is stopped within timeout_s + 10 %, and none that slept for
less. Whoever survives serves the next run; no local worker outlives its master. A worker that is
gone before it was met is an error that names it. The last worker with nobody to take over ends the
run with exit code 6, and its message names worker, layers and experts. With replicas of all
experts, nobody reads anything again.

Masters and workers started by hand are forked from a process that has imported everything
(chaos_rpc_nursery.py); local workers are started as usual. Exit code 1 if anything is not as it
must be; the logs are kept then.
"""

import json as json_format
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, cast

from chaos_rpc_care import look_after
from chaos_rpc_nursery import Nursery
from chaos_rpc_plan import KINDS, Kind, Plan, Start, TaskName, Transport, draw
from chaos_rpc_record import Run, Setting
from chaos_rpc_report import Line, line_of, report_of, table_of
from chaos_rpc_run import Runner
from chaos_rpc_team import HandWorker, free_address
from chaos_rpc_verdict import judge
from jsonargparse import CLI

REFERENCE_S = 120.0
# Local workers are interpreters that import torch, as many at once as there are workers.
JOIN_TIMEOUT_S = {"hand": 4.0, "local": 60.0}
DEMO_ROWS = Path(__file__).parents[1] / "moe_lightning" / "demo" / "prompts.jsonl"


class Chaos:
    """Runs with faults, one after the other.

    Args:
        directory: Where everything goes.
        nursery: Where processes are born.
        num_workers: How many workers a run has.
        timeout_s: Longest silence of a worker that is not lost.
        num_rows: How many rows a run has.
        num_tokens: How many tokens Generate makes of each.
    """

    def __init__(
        self,
        directory: Path,
        nursery: Nursery,
        *,
        num_workers: int,
        timeout_s: float,
        num_rows: int,
        num_tokens: int,
    ) -> None:
        rows = DEMO_ROWS.read_text().splitlines(keepends=True)[:num_rows]
        (directory / "rows.jsonl").write_text("".join(rows))
        self.setting = Setting(
            nursery,
            directory,
            checkpoint="demo",
            rows=directory / "rows.jsonl",
            num_tokens=num_tokens,
            batch_tokens=(25 + num_tokens) * num_rows // 2,  # two batches or three
            timeout_s=timeout_s,
            join_timeout_s=JOIN_TIMEOUT_S,
        )
        self._team: list[HandWorker] = []
        self._num_workers = num_workers
        self._references: dict[TaskName, Path] = {}
        self._usual: dict[tuple[Start, Transport, TaskName], Run] = {}
        self._num_usual = 0

    def run(self, plan: Plan) -> Line:
        """Carry a plan out, and judge what came of it.

        Args:
            plan: The plan.

        Returns:
            What came of it.
        """
        usual = self._usual_run(plan) if plan.faults else None
        return self._run(plan, usual)[1]

    def _run(self, plan: Plan, usual: Run | None) -> tuple[Run, Line]:
        options: list[object] = []
        if plan.sort == "replicas":
            assert usual is not None, "its faults have their moments"
            options = ["--trainer.strategy.file", self._replicas(plan, usual)]
        if plan.sort == "adopted":
            options = ["--trainer.strategy.master_adopts", "true"]
        reference = self._reference(plan.task)
        if plan.start == "hand":
            self._gather()
        run = Runner(self.setting, self._team).carry_out(plan, options, usual)
        verdict = judge(run, self.setting, reference, usual)
        if plan.start == "hand":
            verdict.violations += look_after(run, self.setting, self._team)
        return run, line_of(run, verdict, usual)

    def _gather(self) -> None:
        while len(self._team) < self._num_workers:
            number = len(self._team)
            address = f"ipc://{self.setting.directory}/w{number}" if number % 2 else free_address()
            log = self.setting.directory / f"worker{number}.log"
            self._team.append(HandWorker(self.setting.nursery, address, "demo", log))
        for worker in self._team:
            assert worker.wait_until_listening(), f"{worker.address} does not listen"

    def _usual_run(self, plan: Plan) -> Run:
        key = (plan.start, plan.transport, plan.task)
        if key not in self._usual:
            self._num_usual += 1
            calm = Plan(900 + self._num_usual, "one", *key, self._num_workers, ())
            run, line = self._run(calm, None)
            print(line, flush=True)
            if line.violations:
                raise RuntimeError("without any fault: " + "; ".join(line.violations))
            self._usual[key] = run
        return self._usual[key]

    def _reference(self, task: TaskName) -> Path:
        if task not in self._references:
            output = self.setting.directory / f"reference-{task}"
            log = output.with_suffix(".log")
            child = self.setting.nursery.start(self.setting.command(task, output), log=log)
            if not child.wait(REFERENCE_S) or child.code != 0:
                raise RuntimeError(f"one device: exit code {child.code}: {child.said()}")
            self._references[task] = output / "predictions.jsonl"
        return self._references[task]

    def _replicas(self, plan: Plan, usual: Run) -> Path:
        """A placement that gives each expert to two workers."""
        path = self.setting.directory / f"replicas{plan.number}.json"
        placement = json_format.loads((usual.output / "placement.json").read_text())
        for experts in placement["layers"].values():
            for expert, slots in enumerate(experts):
                slots[:] = [expert % plan.num_workers, (expert + 1) % plan.num_workers]
        path.write_text(json_format.dumps(placement))
        return path


def carry_out(
    runs: Sequence[int],
    *,
    seed: int,
    directory: Path,
    kinds: Sequence[Kind] = KINDS,
    transports: Sequence[Transport] = ("zmq", "tensorpipe"),
    starts: Sequence[Start] = ("hand", "local"),
    tasks: Sequence[TaskName] = ("Generate", "Score"),
    num_workers: int = 3,
    timeout_s: float = 2.0,
    num_rows: int = 24,
    num_tokens: int = 24,
) -> Iterator[Line]:
    """Draw plans and carry them out; at the end, whoever was started by hand serves once more.

    Args:
        runs: Numbers of the plans.
        seed: Their seed.
        directory: Where everything goes.
        kinds: Kinds of faults.
        transports: Transports, in turns.
        starts: Ways to start workers, in turns.
        tasks: What is computed; the first one mostly.
        num_workers: How many workers a run has.
        timeout_s: Longest silence of a worker that is not lost.
        num_rows: How many rows a run has.
        num_tokens: How many tokens Generate makes of each.

    Yields:
        What came of each run.
    """
    with closing(Nursery()) as nursery:
        chaos = Chaos(
            directory,
            nursery,
            num_workers=num_workers,
            timeout_s=timeout_s,
            num_rows=num_rows,
            num_tokens=num_tokens,
        )
        for number in runs:
            plan = draw(
                number,
                seed=seed,
                kinds=kinds,
                transports=transports,
                starts=starts,
                num_workers=num_workers,
                timeout_s=timeout_s,
                tasks=tasks,
            )
            yield chaos.run(plan)
        if "hand" in starts:
            yield chaos.run(Plan(999, "one", "hand", transports[0], tasks[0], num_workers, ()))


def main(
    runs: int = 200,
    seed: int | None = None,
    faults: str = ",".join(KINDS),
    transport: Literal["zmq", "tensorpipe", "both"] = "both",
    starts: str = "hand,local",
    tasks: str = "Generate,Score",
    workers: int = 3,
    timeout_s: float = 2.0,
    rows: int = 24,
    tokens: int = 24,
    only: list[int] | None = None,
    json: str | None = None,
) -> int:
    """Kill and stop workers and masters of real runs, and see what comes.

    Args:
        runs: How many runs.
        seed: What is drawn; the default is another one each time.
        faults: Kinds of faults, out of kill, stop, restart (killed, and started again at the same
            address at once; of workers started by hand), kill_master, nap_master, interrupt and
            interrupt_twice.
        transport: How rows travel; both is in turns.
        starts: Whether workers are started by hand or by the master (local), in turns.
        tasks: What is computed; the first one mostly.
        workers: How many workers a run has.
        timeout_s: Longest silence of a worker that is not lost, in seconds.
        rows: How many rows a run has.
        tokens: How many tokens Generate makes of each.
        only: Numbers of the runs to be repeated.
        json: File for all results.

    Returns:
        1 if anything is not as it must be.
    """
    seed = random.randrange(10**6) if seed is None else seed
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"seed {seed}, {runs} runs, files in {directory}", flush=True)
    begin_s, lines = time.monotonic(), []
    transports = ("zmq", "tensorpipe") if transport == "both" else (transport,)
    for line in carry_out(
        range(runs) if only is None else only,
        seed=seed,
        directory=directory,
        kinds=cast(list[Kind], faults.split(",")),
        transports=cast(tuple[Transport, ...], transports),
        starts=cast(list[Start], starts.split(",")),
        tasks=cast(list[TaskName], tasks.split(",")),
        num_workers=workers,
        timeout_s=timeout_s,
        num_rows=rows,
        num_tokens=tokens,
    ):
        print(line, flush=True)
        lines.append(line)
    num_bad = sum(bool(line.violations) for line in lines)
    print(f"\n{table_of(lines)}\n")
    print(
        f"seed {seed}: {len(lines)} runs in {time.monotonic() - begin_s:.0f} s, {num_bad} with "
        f"violations{f'; logs in {directory}' if num_bad else ''}"
    )
    if json is not None:
        settings = {"workers": workers, "timeout_s": timeout_s, "rows": rows, "tokens": tokens}
        Path(json).write_text(json_format.dumps(report_of(seed, lines, **settings), indent=1))
    if not num_bad:
        shutil.rmtree(directory)
    return int(num_bad > 0)


if __name__ == "__main__":
    sys.exit(CLI(main, as_positional=False))
