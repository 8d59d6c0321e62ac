"""Kill and stop ranks of sharded runs at random moments, and look at what becomes of the others.

    python scripts/chaos_ranks.py --runs 20 --seed 0

Each run is ``predict`` or ``fit`` with a model over some ranks, one of which is killed (SIGKILL) or
stopped (SIGSTOP) at a moment drawn from the length of an undisturbed run. The others must end in
time with exit code 6 and name that rank and its host. Then the same command, undisturbed, must give
what it gave before all that: rows, or losses. Ranks are forked with the variables that torchrun
would set.
"""

import argparse
import csv
import json
import random
import re
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from chaos_rpc_nursery import Child, Nursery

from moe_lightning.demo.random_checkpoint import make_checkpoint

TIMEOUT_S = 6
BOUND_S = TIMEOUT_S + 30  # a diagnosis, the time a hanging thread is given, and a busy machine
RUN_S = 120.0
NUM_ROWS = 300
VERBS = ("predict", "fit")
NOT_MET = "the ranks did not meet"


class Scene:
    """A checkpoint, rows, and runs over them.

    Args:
        directory: Where all of it goes.
        num_ranks: Ranks of each run.
    """

    def __init__(self, directory: Path, num_ranks: int) -> None:
        self.directory = directory
        self.num_ranks = num_ranks
        self.nursery = Nursery()
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
        rows = [{"id": str(n), "prompt": f"row {n} " + "so " * (n % 9)} for n in range(NUM_ROWS)]
        (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self, verb: str, name: str, output: Path) -> list[Child]:
        """Start all ranks of a run.

        Args:
            verb: ``predict`` or ``fit``.
            name: For its logs.
            output: Where what it makes goes.

        Returns:
            The processes, in the order of their ranks.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        of_verb = {
            "predict": (
                *("--data.input", self.directory / "rows.jsonl", "--data.max_batch_tokens", 150),
                *("--model.task.max_new_tokens", 12),
            ),
            "fit": (
                *("--data.train", "demo", "--data.val", "demo", "--data.sequence_length", 64),
                *("--trainer.max_steps", 30, "--trainer.log_every_n_steps", 5),
                *("--trainer.limit_val_batches", 2),
            ),
        }
        arguments = (
            *(verb, "--model.checkpoint", self.checkpoint, "--output_dir", output),
            *of_verb[verb],
            *("--trainer.accelerator", "cpu", "--trainer.devices", self.num_ranks),
            *("--trainer.strategy", "moe_fsdp", "--trainer.strategy.ep_size", self.num_ranks),
            *("--trainer.strategy.timeout_s", TIMEOUT_S),
        )
        environ = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_WORLD_SIZE": str(self.num_ranks),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": name,
        }
        return [
            self.nursery.start(
                arguments,
                log=self.directory / f"{name}-{rank}.log",
                environ=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(self.num_ranks)
        ]

    def run(self, verb: str, name: str, output: Path) -> tuple[list[str], float]:
        """Run undisturbed.

        Args:
            verb: ``predict`` or ``fit``.
            name: For its logs.
            output: Where what it makes goes.

        Returns:
            What it gave, and how long it took.
        """
        begin_s = time.monotonic()
        for child in self.start(verb, name, output):
            if not child.wait(RUN_S) or child.code != 0:
                raise AssertionError(f"{name}: exit code {child.code}: {child.said()}")
        return results(output), time.monotonic() - begin_s


def results(output: Path) -> list[str]:
    """The rows of ``predict`` in the order of their text, or the losses of ``fit``."""
    predictions = output / "predictions.jsonl"
    if predictions.exists():
        return sorted(predictions.read_text().splitlines())
    files = sorted(output.glob("logs/**/metrics.csv"), key=lambda file: file.stat().st_mtime)
    if not files:
        return []
    with files[-1].open() as file:
        return [row["train_loss"] for row in csv.DictReader(file) if row["train_loss"]]


def verdict(child: Child, begin_s: float, victim: int) -> str | None:
    """What is wrong with how a rank ended after another one was lost; None if nothing is."""
    if not child.wait(max(0.0, begin_s + BOUND_S - time.monotonic())):
        return f"has not ended within {BOUND_S} s"
    if child.code != 6:
        return f"exit code {child.code}"
    if NOT_MET in child.said():
        return None  # nobody knows who did not come
    errors = re.findall(r"error: (rank \d+ on host \S+ .*)", child.said())
    wanted = f"rank {victim} on host {socket.gethostname()} (process "
    if not any(error.startswith(wanted) for error in errors):
        return f"does not name rank {victim}"
    return None


def disturb(
    scene: Scene, verb: str, number: int, draw: random.Random, *, wanted: list[str], length_s: float
) -> tuple[str, bool]:
    """One disturbed run.

    Args:
        scene: Where.
        verb: ``predict`` or ``fit``.
        number: Its number.
        draw: Draws victim, signal and moment.
        wanted: What an undisturbed run gives.
        length_s: Length of an undisturbed run.

    Returns:
        What happened, and whether that is all right.
    """
    victim = draw.randrange(scene.num_ranks)
    how = draw.choice([signal.SIGKILL, signal.SIGSTOP])
    moment_s = draw.uniform(0.0, length_s)
    output = scene.directory / f"out-{number}"
    children = scene.start(verb, f"run-{number}", output)
    time.sleep(moment_s)
    said = f"run {number}, {verb}: {how.name} of rank {victim} after {moment_s:.2f} s: "
    if not all(child.is_there for child in children):
        for child in children:
            child.wait(RUN_S)
        return said + "the run was over", results(output) == wanted
    begin_s = time.monotonic()
    children[victim].send(how)
    problems = []
    for rank, child in enumerate(children):
        if rank != victim and (wrong := verdict(child, begin_s, victim)):
            problems.append(f"rank {rank} {wrong}; it said: {child.said()}")
    others = [child for rank, child in enumerate(children) if rank != victim]
    took_s = max(child.end_s for child in others) - begin_s
    for child in children:
        child.end()
    if all(child.code == 0 for child in others):  # they needed the victim no more
        return said + "the run was over", results(output) == wanted
    return said + (" ".join(problems) or f"the others ended within {took_s:.1f} s"), not problems


def main() -> None:
    """The runs, and what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20, help="Disturbed runs.")
    parser.add_argument("--seed", type=int, default=0, help="Draws victims, signals and moments.")
    parser.add_argument("--ranks", type=int, default=2, help="Ranks of each run.")
    parser.add_argument(
        "--verbs",
        nargs="+",
        choices=["predict", "fit"],
        default=["predict", "fit"],
        help="In turn.",
    )
    options = parser.parse_args()
    draw = random.Random(options.seed)
    num_bad = 0
    with tempfile.TemporaryDirectory() as directory:
        scene = Scene(Path(directory), options.ranks)
        try:
            undisturbed = {
                verb: scene.run(verb, f"undisturbed-{verb}", Path(directory, f"undisturbed-{verb}"))
                for verb in options.verbs
            }
            lengths = ", ".join(f"{verb} {s:.1f} s" for verb, (_, s) in undisturbed.items())
            print(f"seed {options.seed}; undisturbed: {lengths}", flush=True)
            for number in range(options.runs):
                verb = options.verbs[number % len(options.verbs)]
                wanted, length_s = undisturbed[verb]
                what, is_right = disturb(
                    scene, verb, number, draw, wanted=wanted, length_s=length_s
                )
                found, _ = scene.run(verb, f"again-{number}", Path(directory, f"out-{number}"))
                if found != wanted or not found:
                    is_right, what = False, f"{what}; the same command gave something else"
                num_bad += not is_right
                print(f"{'' if is_right else 'WRONG '}{what}", flush=True)
        finally:
            scene.nursery.close()
    print(f"{options.runs - num_bad} of {options.runs} runs ended as they should")
    sys.exit(1 if num_bad else 0)


if __name__ == "__main__":
    main()
