"""What looking costs: predict with RoutingBalance, with CommunicationTime, with both, and without.

    python scripts/bench_callbacks.py --rounds 9 --json bench_callbacks.json

One process loads each model once; the ways take turns, in another order each round, and all answer
the same rows. Timed is predict from start to end, the bringing together of what was seen and the
writing of its numbers included; drawing the pictures comes after, and is timed apart. Seconds are
those of the process's CPU, which other programs disturb less than the wall clock's; a second run
without callbacks in each round shows what is left of that. The overhead is the median over the
rounds of the ratio to that round's first run without callbacks.

Models: the demo checkpoint, and a random Qwen3-MoE (hidden 256, 4 layers, 32 experts of 384 of
which 4 are used, fp32).
"""

import logging
import platform
import random
import statistics
import tempfile
import time
import warnings
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import CLI

from moe_lightning import (
    CommunicationTime,
    Generate,
    MoELightningModule,
    PlacementStrategy,
    PromptData,
    RoutingBalance,
    Score,
)
from moe_lightning.demo.random_checkpoint import make_checkpoint

WAYS = ("without", "without again", "routing", "communication", "both")
BOUND = 0.02


class Clock(L.Callback):
    """CPU seconds from the start of predict to its end; give it first and last."""

    def __init__(self) -> None:
        self.started_s = self.ended_s = 0.0

    def on_predict_start(self, *_: Any) -> None:
        if not self.started_s:
            self.started_s = time.process_time()

    def on_predict_end(self, *_: Any) -> None:
        self.ended_s = time.process_time()


def predict(
    module: MoELightningModule, data: PromptData, strategy: Any, way: str, directory: str
) -> tuple[float, float]:
    """Seconds of predict, and of what comes after it."""
    callbacks: list[L.Callback] = []
    if way in ("routing", "both"):
        callbacks.append(RoutingBalance())
    if way in ("communication", "both"):
        callbacks.append(CommunicationTime())
    clock = Clock()
    trainer = L.Trainer(
        strategy=strategy() if callable(strategy) else strategy,
        **({"accelerator": "cpu"} if strategy == "auto" else {}),
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=[clock, *callbacks, clock],
    )
    trainer.predict(module, datamodule=data, return_predictions=False)
    done_s = time.process_time()
    return clock.ended_s - clock.started_s, done_s - clock.ended_s


def measure(
    name: str, module: MoELightningModule, data: PromptData, strategy: Any, rounds: int
) -> dict[str, Any]:
    """Times and overheads of one case."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    after: dict[str, list[float]] = {way: [] for way in WAYS}
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        for number in range(rounds + 1):  # the first is for warming up
            for way in order.sample(WAYS, len(WAYS)):
                predict_s, after_s = predict(module, data, strategy, way, directory)
                if number:
                    seconds[way].append(predict_s)
                    after[way].append(after_s)
    result: dict[str, Any] = {"case": name, "seconds": statistics.median(seconds["without"])}
    for way in WAYS[1:]:
        pairs = zip(seconds[way], seconds["without"], strict=True)
        ratios = sorted(one / other - 1 for one, other in pairs)
        quartiles = statistics.quantiles(ratios, n=4)
        result[way] = {
            "overhead": statistics.median(ratios),
            "quartiles": [quartiles[0], quartiles[2]],
            "of_least": min(seconds[way]) / min(seconds["without"]) - 1,
            "after_s": statistics.median(after[way]) - statistics.median(after["without"]),
        }
    return result


def main(
    rounds: int = 9,
    cases: list[Literal["demo generate", "demo score", "random score", "random placement"]]
    | None = None,
    threads: int | None = None,
    json: Path | None = None,
) -> int:
    """Measure.

    Args:
        rounds: Rounds that count; each runs every way once.
        cases: Which cases; all by default.
        threads: Threads of torch; its own default if not given.
        json: Where to write the figures.

    Returns:
        0 if both callbacks together cost no more than 2 % in every case, otherwise 1.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if threads is not None:
        torch.set_num_threads(threads)
    wanted = cases or ["demo generate", "demo score", "random score", "random placement"]
    results = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = "demo"
        if any("random" in case for case in wanted):
            shape = {"hidden_size": 256, "expert_size": 384, "num_layers": 4, "num_experts": 32}
            heads = {"num_heads": 8, "num_kv_heads": 4, "vocab_size": 8192, "max_positions": 512}
            random_model = make_checkpoint(
                Path(directory) / "random", family="qwen3_moe", top_k=4, **shape, **heads
            )
        for case in wanted:
            checkpoint = "demo" if "demo" in case else str(random_model)
            task = Generate(max_new_tokens=64) if "generate" in case else Score()
            module = MoELightningModule(checkpoint, task=task)
            strategy: Any = "auto"
            if "placement" in case:
                strategy = partial(PlacementStrategy, ["cpu", "cpu"])  # one a trainer
            # The demo's 60 prompts; scored several times, so that a run takes a while.
            data = PromptData("demo" if "generate" in case else _many(directory))
            results.append(measure(case, module, data, strategy, rounds))
            print(_line(results[-1]), flush=True)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"\n{machine}, torch {torch.__version__}; {rounds} rounds, median [quartiles]")
    if json is not None:
        json.write_text(dumps({"machine": machine, "rounds": rounds, "cases": results}, indent=2))
    return int(any(result["both"]["overhead"] > BOUND for result in results))


def _many(directory: str) -> str:
    path = Path(directory) / "rows.txt"
    words = ["it", "was", "the", "best", "of", "times", "it", "was", "the", "worst", "of", "times"]
    lengths = random.Random(1)
    rows = (" ".join(lengths.choices(words, k=lengths.randint(8, 60))) for _ in range(400))
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def _line(result: dict[str, Any]) -> str:
    parts = []
    for way in WAYS[1:]:
        each = result[way]
        low, high = each["quartiles"]
        parts.append(
            f"{way} {100 * each['overhead']:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}] "
            f"(least {100 * each['of_least']:+.1f}), then {each['after_s']:.2f} s"
        )
    return f"{result['case']:<18}{result['seconds']:.2f} s   " + "; ".join(parts)


if __name__ == "__main__":
    raise SystemExit(CLI(main))
