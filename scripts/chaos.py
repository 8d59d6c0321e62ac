"""Kill predict jobs at random moments, and see that the same command continues them.

    python scripts/chaos.py --runs 30 --seed 1
    python scripts/chaos.py --runs 500 --processes 2 --strategies single,placement
    python scripts/chaos.py --seed 1 --only 17                          # one of them again

Each run is ``python -m moe_lightning predict`` with one strategy: it is started, some of its
processes get SIGKILL, SIGTERM or SIGINT (see chaos_job_plan.py), and the same command is started
again, up to three times with another strike, until it ends by itself with exit code 0.

Then its predictions must be, byte by byte, those of an undisturbed run, and nothing else may be
left. No row that was in the ledger is computed again, and of the others no more than the batch
that each rank was at. Interrupted, it ends with 5, without a rank or all workers with 6, in
bounded time; whatever it started ends with it. Exit code 1 if anything is not so; the files are
kept then.
"""

import argparse
import random
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from chaos_job_plan import STRATEGIES, draw
from chaos_job_processes import end_all
from chaos_job_report import table_of
from chaos_job_run import Run, carry_out
from chaos_job_scene import Scene
from chaos_rpc_nursery import Nursery
from tqdm import tqdm


def main(arguments: list[str] | None = None) -> int:
    """Disturb runs, and print a table of them.

    Args:
        arguments: The command line; None is that of the process.

    Returns:
        0 if every run bore it, 1 otherwise.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=30, help="How many runs.")
    parser.add_argument("--seed", type=int, help="Draws all that is random. Default: a new one.")
    parser.add_argument(
        "--strategies", type=_strategies, default=STRATEGIES, help="Some of single,placement,..."
    )
    parser.add_argument("--processes", type=int, default=1, help="Runs at a time.")
    parser.add_argument("--only", type=int, help="The number of the only run that is carried out.")
    parser.add_argument("--keep", type=Path, help="An empty directory where all files are kept.")
    options = parser.parse_args(arguments)
    seed = random.randrange(1_000_000) if options.seed is None else options.seed
    numbers = range(options.runs) if options.only is None else [options.only]
    plans = [draw(number, seed, options.strategies) for number in numbers]
    directory = options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    directory.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}, {len(plans)} runs in {directory}", flush=True)
    runs: list[Run] = []
    with closing(Nursery()) as nursery:
        scene = Scene(directory, nursery)
        pool = ThreadPoolExecutor(options.processes)
        try:
            usuals = {}
            for strategy in dict.fromkeys(plan.strategy for plan in plans):
                usuals[strategy] = scene.usual(strategy)
                print(f"undisturbed {strategy}: {usuals[strategy]}", flush=True)
            carried = pool.map(lambda plan: carry_out(plan, scene, usuals), plans)
            for run in tqdm(carried, total=len(plans), unit="run"):
                runs.append(run)
                (directory / f"{run.plan.number:03d}" / "run.txt").write_text(f"{run}\n")
                if run.violations:
                    tqdm.write(str(run))
        finally:
            pool.shutdown(cancel_futures=True)
            for token in scene.tokens:
                end_all(token)
    print(table_of(runs))
    wrong = [run.plan.number for run in runs if run.violations]
    if not wrong:
        if options.keep is None:
            shutil.rmtree(directory)
        return 0
    names = ",".join(options.strategies)
    print(f"{len(wrong)} runs did not bear it; their files are in {directory}. One again:")
    for number in wrong:
        print(f"  python scripts/chaos.py --seed {seed} --strategies {names} --only {number}")
    return 1


def _strategies(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(STRATEGIES):
        raise argparse.ArgumentTypeError(f"choose among {','.join(STRATEGIES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
