"""What a job costs: predict of the demo with PredictionWriter, without it, and with a bare writer.

    python scripts/bench_jobs.py --rounds 7 --json bench_jobs.json

One process loads the demo once. The ways take turns, in another order each round, into a fresh
directory each time:

    job           Trainer.predict with PromptData and PredictionWriter: plan, parts, ledger, finish
    none          the same without PredictionWriter
    none again    the same once more: what is left of the noise
    bare          a callback that writes JSON lines to one file, as any tool does: the peer

Timed is the whole of Trainer.predict, reading and planning of the input included, in CPU seconds
of the process (all its threads) and of the wall clock. The difference of two runs is mostly noise
where the cost is a hundredth of them. Therefore the hooks of PredictionWriter are timed from inside
too, and the verdict is on these: their share of the run that they are part of. What PromptData does
for the job (it leaves out rows) is not in them, and is within the noise.
"""

import json
import logging
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import CLI
from typing_extensions import override

from moe_lightning import Generate, MoELightningModule, PredictionWriter, PromptData, Score
from moe_lightning.demo import prompts_path

WAYS = ("job", "none", "none again", "bare")
BOUND = 0.02
Seconds = tuple[float, float]  # of CPU, of the wall clock


class Stopwatch:
    """Sums of CPU and wall seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, Seconds] = {}
        self.calls: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of a block."""
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
            before = self.seconds.get(name, (0.0, 0.0))
            self.seconds[name] = (before[0] + cpu_s, before[1] + wall_s)
            self.calls[name] = self.calls.get(name, 0) + 1


class TimedWriter(PredictionWriter):
    """The writer, timed hook by hook; commits are a part of the batches' ends."""

    def __init__(self, output_dir: str) -> None:
        super().__init__(output_dir)
        self.watch = Stopwatch()

    @override
    def setup(self, *args: Any, **kwargs: Any) -> None:
        with self.watch("setup"):
            super().setup(*args, **kwargs)

    @override
    def on_predict_start(self, *args: Any, **kwargs: Any) -> None:
        with self.watch("batch ends"):
            super().on_predict_start(*args, **kwargs)

    @override
    def write_on_batch_end(self, *args: Any, **kwargs: Any) -> None:
        with self.watch("batch ends"):
            super().write_on_batch_end(*args, **kwargs)

    @override
    def _commit(self, *args: Any, **kwargs: Any) -> None:
        with self.watch("commits"):
            super()._commit(*args, **kwargs)

    @override
    def teardown(self, *args: Any, **kwargs: Any) -> None:
        with self.watch("teardown"):
            super().teardown(*args, **kwargs)


class BareWriter(L.Callback):
    """Lines of JSON in the order of computing, to one file that is never synced."""

    def __init__(self, output_dir: str) -> None:
        self.path = Path(output_dir) / "predictions.jsonl"

    @override
    def on_predict_start(self, *_: Any) -> None:
        self._file = self.path.open("w")

    @override
    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        for row in outputs:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    @override
    def on_predict_end(self, *_: Any) -> None:
        self._file.close()


def predict(
    module: MoELightningModule, data: PromptData, way: str, directory: str
) -> tuple[Seconds, Stopwatch | None]:
    """One run: its seconds, and those of the writer's hooks."""
    callbacks: list[L.Callback] = []
    writer = TimedWriter(directory) if way == "job" else None
    if writer is not None:
        callbacks.append(writer)
    elif way == "bare":
        callbacks.append(BareWriter(directory))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=callbacks,
    )
    whole = Stopwatch()
    with whole("run"):
        trainer.predict(module, datamodule=data, return_predictions=False)
    if way in ("job", "bare"):
        num_lines = (Path(directory) / "predictions.jsonl").read_bytes().count(b"\n")
        assert num_lines == data.num_rows, f"{way}: {num_lines} of {data.num_rows} rows"
    return whole.seconds["run"], None if writer is None else writer.watch


def measure(
    name: str, module: MoELightningModule, data: PromptData, rounds: int, directory: Path | None
) -> dict[str, Any]:
    """All rounds of one case: every way's seconds, and those inside of the job."""
    runs: dict[str, list[Seconds]] = {way: [] for way in WAYS}
    inside: list[dict[str, Seconds]] = []
    first: dict[str, Seconds] = {}
    order = random.Random(0)
    for number in range(rounds + 1):  # the first is for warming up
        for way in order.sample(WAYS, len(WAYS)):
            with tempfile.TemporaryDirectory(dir=directory) as output_dir:
                seconds, watch = predict(module, data, way, output_dir)
            if number:
                runs[way].append(seconds)
            if watch is not None:
                if number:
                    inside.append(watch.seconds)
                else:
                    first = watch.seconds
    return {
        "case": name,
        "rows": data.num_rows,
        "batches": len(data.batches),
        "runs": runs,
        "inside": inside,
        "first_inside": first,
    }


def overheads(result: dict[str, Any], way: str, clock: int) -> list[float]:
    """Of each round: how much more than that round's run without a writer."""
    pairs = zip(result["runs"][way], result["runs"]["none"], strict=True)
    return [one[clock] / none[clock] - 1 for one, none in pairs]


def shares(result: dict[str, Any], clock: int) -> list[float]:
    """Of each round: the writer's hooks' part of the whole run."""
    hooks = ("setup", "batch ends", "teardown")
    return [
        sum(inside.get(hook, (0.0, 0.0))[clock] for hook in hooks) / run[clock]
        for inside, run in zip(result["inside"], result["runs"]["job"], strict=True)
    ]


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Two Markdown tables: whole runs, and what the job does in them."""
    lines = [
        "| case | rows | batches | without: CPU s | wall s | "
        + " | ".join(f"{way}: CPU | wall" for way in WAYS if way != "none")
        + " |",
        "|---|" + "---:|" * 10,
    ]
    for result in results:
        none = [spread([run[c] for run in result["runs"]["none"]], "{:.2f}") for c in (0, 1)]
        more = [
            spread([100 * x for x in overheads(result, way, clock)], "{:+.1f}", " %")
            for way in WAYS
            if way != "none"
            for clock in (0, 1)
        ]
        head = [result["case"], str(result["rows"]), str(result["batches"])]
        lines.append("| " + " | ".join([*head, *none, *more]) + " |")
    phases = ("setup", "batch ends", "commits", "teardown")
    lines += [
        "",
        "| case | "
        + " | ".join(f"{phase}: CPU ms | wall" for phase in phases)
        + " | share of CPU | of wall | verdict |",
        "|---|" + "---:|" * (2 * len(phases) + 2) + "---|",
    ]
    for result in results:
        cells = [result["case"]]
        for phase in phases:
            for clock in (0, 1):
                times = [inside.get(phase, (0.0, 0.0))[clock] for inside in result["inside"]]
                cells.append(spread([1e3 * t for t in times], "{:.1f}"))
        for clock in (0, 1):
            cells.append(spread([100 * x for x in shares(result, clock)], "{:.2f}", " %"))
        cells.append("ok" if is_cheap(result) else f"above {100 * BOUND:.0f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def is_cheap(result: dict[str, Any]) -> bool:
    """Whether the job's share is within the bound, by both clocks."""
    return all(statistics.median(shares(result, clock)) <= BOUND for clock in (0, 1))


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Median and quartiles."""
    if len(values) == 1:
        return form.format(values[0]) + unit
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    middle = form.format(statistics.median(values))
    return f"{middle}{unit} [{form.format(low)}, {form.format(high)}]"


def main(
    rounds: int = 7,
    tasks: list[Literal["score", "generate"]] | None = None,
    rows: list[int] | None = None,
    threads: int | None = None,
    directory: Path | None = None,
    json_file: Path | None = None,
) -> int:
    """Measure.

    Args:
        rounds: Rounds that count; each runs every way once.
        tasks: Which tasks; both by default.
        rows: Numbers of rows: the shipped prompts, repeated or cut. The default is 60, as they
            ship, and 2040.
        threads: Threads of torch; its own default if not given.
        directory: Where outputs go, each in a directory of its own. The default is the system's for
            temporary files.
        json_file: Where to write all the times.

    Returns:
        0 if the job takes no more than 2 % of the run in every case, otherwise 1.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if threads is not None:
        torch.set_num_threads(threads)
    results = []
    with tempfile.TemporaryDirectory() as inputs:
        for task in tasks or ["score", "generate"]:
            module = MoELightningModule("demo", task=Score() if task == "score" else Generate())
            for num_rows in rows or [60, 2040]:
                data = PromptData(_prompts(Path(inputs), num_rows))
                name = f"{task}, {num_rows} rows"
                results.append(measure(name, module, data, rounds, directory))
    print(tables(results))
    print(f"\n{_machine(directory)}; {rounds} rounds, median [quartiles]")
    first = "; ".join(
        f"{name} {1e3 * cpu_s:.1f} / {1e3 * wall_s:.1f} ms"
        for name, (cpu_s, wall_s) in results[0]["first_inside"].items()
    )
    print(f"The process's first job, before that (CPU / wall): {first}")
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": _machine(directory), "cases": results}))
    return int(not all(is_cheap(result) for result in results))


def _prompts(directory: Path, num_rows: int) -> str:
    """The shipped prompts, again and again, each time with other ids."""
    shipped = [json.loads(line) for line in prompts_path().read_text().splitlines()]
    path = directory / f"prompts-{num_rows}.jsonl"
    with path.open("w") as file:
        for number in range(num_rows):
            row = shipped[number % len(shipped)]
            again = number // len(shipped)
            id = f"{row['id']}-{again}" if again else row["id"]
            file.write(json.dumps(row | {"id": id}, ensure_ascii=False) + "\n")
    return str(path)


def _machine(directory: Path | None) -> str:
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        models = [line for line in information.read_text().splitlines() if "model name" in line]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    place = str(directory or tempfile.gettempdir())
    found = subprocess.run(["stat", "-f", "-c", "%T", place], capture_output=True, text=True)
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load "
        f"{os.getloadavg()[0]:.1f}; outputs on {found.stdout.strip() or 'unknown'}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}, "
        f"moe_lightning {version('moe_lightning')}"
    )


if __name__ == "__main__":
    raise SystemExit(CLI(main))
