"""Runs random histories of jobs on a simulated disk: commits, crashes, power cuts, zombies.

    scripts/simulate_jobs.py [--schedules 100000] [--seed 0] [--processes 2]

Each schedule has a seed of its own; one that breaks a promise is printed with its steps, and its
seed repeats it (--schedules 1 --seed SEED).
"""

import argparse
import sys
import time
import traceback
from collections import Counter
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from job_history import History

CHUNK = 200


def run_schedules(first: int, num: int) -> tuple[Counter, list[str]]:
    """Run schedules with consecutive seeds; returns what happened, and what went wrong."""
    counts, problems = Counter(), []
    for seed in range(first, first + num):
        history = History(Random(seed))
        try:
            history.run(num_steps=history.random.randint(1, 40))
        except Exception:
            steps = ", ".join(history.steps)
            problems.append(f"seed {seed}: {steps}\n{traceback.format_exc()}")
        counts.update(history.counts)
        counts["schedules"] += 1
        counts["steps"] += len(history.steps)
    return counts, problems


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schedules", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    begin_s = time.monotonic()
    counts, problems = Counter(), []
    firsts = range(options.seed, options.seed + options.schedules, CHUNK)
    end = options.seed + options.schedules
    with (
        get_context("spawn").Pool(options.processes) as pool,
        tqdm(total=options.schedules, unit="schedule") as bar,
    ):
        sizes = [(first, min(CHUNK, end - first)) for first in firsts]
        for found, wrong in pool.imap_unordered(partial(_call, run_schedules), sizes):
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


def _call(function, arguments):
    return function(*arguments)


if __name__ == "__main__":
    sys.exit(main())
