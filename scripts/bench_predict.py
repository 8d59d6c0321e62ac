"""Compare `predict` with the loop that a user would write in plain transformers, in one run.

    python scripts/bench_predict.py --json bench_predict.json
    scripts/make_peer_environment.sh
    python scripts/bench_predict.py --peer_python .peers/bin/python --json bench_predict.json

    workload file ─┬─▶ plain transformers: batches of 16 in input order, padded, forward or generate
                   ├─▶ moe_lightning: Trainer.predict(MoELightningModule, PromptData) to files,
                   │   with each backend
                   ├─▶ bare loop: the same planned batches without Lightning, with the first backend
                   └─▶ vLLM for CPUs, in a process of its own (generate only)

Models: the demo checkpoint, and a random Qwen3-MoE of 203 M parameters (hidden 512, 8 layers, 32
experts of 480 of which 4 are used, 8 heads, 4 of them for keys and values, vocabulary 8192, fp32).
Rows: prompts and answers of log-normal lengths; every row says how many tokens it wants, and no row
ends before, so all sides generate as many tokens. All have their model loaded, and the Lightning
trainer is made, before the clock starts; then they read the file, tokenise, compute, and write
their answers to a file. vLLM does none of that but computing.

The contestants take turns, so that a busy minute of the machine hits all of them, and so do the
probes of the machine's limits (bench_experts_machine.py). The time per part and the fraction of the
limit come from one more run per backend, which is not timed otherwise. The limit of a backend that
stores the experts' weights in fewer bytes is lower; all others' is that of the first backend's
forwards in fp32. Backends that keep the weights as they are must give the same answers; of those
that round them it is measured how far the answers are from transformers'.
"""

import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Any, Literal

import torch
from bench_experts_machine import Machine, Rates, describe_machine
from bench_predict_comparison import Bench
from bench_predict_contestants import PLAIN_BATCH_ROWS, BackendUnusableError, CpuBackendName
from bench_predict_report import describe, describe_verdicts, judge
from bench_predict_results import Comparison
from bench_predict_workload import Lengths, TaskName, make_workload, random_model
from jsonargparse import CLI
from transformers.utils import logging as transformers_logging

from moe_lightning.errors import MoELightningError, UsageError

BACKENDS: tuple[CpuBackendName, ...] = ("auto", "cpu_half", "cpu_int8")


def main(
    checkpoint: str = "demo",
    models: list[Literal["demo", "random"]] | None = None,
    tasks: list[TaskName] | None = None,
    backends: list[CpuBackendName] | None = None,
    rows: int = 128,
    seed: int = 0,
    prompt_median: float = 60,
    prompt_max: int = 400,
    answer_median: float = 32,
    answer_max: int = 256,
    sigma: float = 0.8,
    repetitions_score: int = 5,
    repetitions_generate: int = 3,
    max_batch_tokens: int = 16384,
    threads: int | None = None,
    seconds_machine: float = 1.5,
    read_mb: int = 256,
    hidden_size: int = 512,
    num_layers: int = 8,
    num_experts: int = 32,
    expert_size: int = 480,
    vocab_size: int = 8192,
    peer_python: str | None = None,
    cache: Path | None = None,
    json: Path | None = None,
) -> None:
    """Compare predict with the loop that a user would write in plain transformers.

    Args:
        checkpoint: The first model, called demo in the table.
        models: Which models to measure; the default is both.
        tasks: Which tasks to measure; the default is both.
        backends: How our contestants compute experts; the default is [auto,cpu_half,cpu_int8].
        rows: Rows of the workload.
        seed: Seed of the rows.
        prompt_median: Median tokens of a prompt.
        prompt_max: Most tokens of a prompt.
        answer_median: Median new tokens of a row.
        answer_max: Most new tokens of a row.
        sigma: Standard deviation of the logarithm of both lengths.
        repetitions_score: Timed runs of score, after one warm-up run.
        repetitions_generate: Timed runs of generate, after one warm-up run.
        max_batch_tokens: Token budget of our batches; the default is PromptData's.
        threads: Threads of torch, for all contestants; the default is torch's.
        seconds_machine: How long the limits of the machine are measured before the first run;
            they are measured again before each repetition.
        read_mb: Megabytes of the matrix whose reading gives the bandwidth; more than all caches.
        hidden_size: Hidden width of the random model.
        num_layers: Layers of the random model.
        num_experts: Experts per layer of the random model; 4 of them are used per token.
        expert_size: Inner width of an expert of the random model.
        vocab_size: Vocabulary of the random model.
        peer_python: Interpreter of the environment of scripts/make_peer_environment.sh, for a row
            of vLLM; the default is to do without.
        cache: Where the random model is kept between runs; the default is a temporary directory.
        json: File for all numbers.

    Raises:
        UsageError: If a backend is named twice.
    """
    backends = list(BACKENDS) if backends is None else backends
    if not backends or len(set(backends)) < len(backends):
        raise UsageError(
            f"--backends {backends}: it must name at least one backend, and each one once, since "
            "each is a contestant of its own."
        )
    _be_quiet()
    if threads:
        torch.set_num_threads(threads)
    machine = Machine(torch.device("cpu"), torch.float32, read_mb << 20)
    start_s = time.perf_counter()
    machine.measure()
    while time.perf_counter() - start_s < seconds_machine:
        machine.measure()
    hardware = describe_machine(torch.device("cpu"))
    hardware["versions"]["lightning"] = version("lightning")
    versions = ", ".join(f"{name} {number}" for name, number in hardware["versions"].items())
    print(
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads\n{versions}"
    )
    print(
        f"{rows} rows, prompts of {prompt_median:g} and answers of {answer_median:g} tokens "
        f"(medians, log-normal, sigma {sigma:g}), fp32, batches of {PLAIN_BATCH_ROWS} rows in "
        f"input order against {max_batch_tokens:,} tokens planned"
    )
    comparisons = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        for name in models or ["demo", "random"]:
            source = checkpoint
            if name == "random":
                path = random_model(
                    cache or directory,
                    hidden_size=hidden_size,
                    num_layers=num_layers,
                    num_experts=num_experts,
                    expert_size=expert_size,
                    vocab_size=vocab_size,
                )
                source = str(path)
            try:
                bench = Bench(
                    name,
                    source,
                    machine,
                    backends=backends,
                    max_batch_tokens=max_batch_tokens,
                    peer_python=peer_python,
                    directory=directory,
                )
            except (MoELightningError, BackendUnusableError) as error:
                print(f"\n{name}: skipped ({error})")
                continue
            workload = make_workload(
                directory / f"{name}.jsonl",
                bench.tokenizer,
                rows=rows,
                prompts=Lengths(prompt_median, sigma, 4, prompt_max),
                answers=Lengths(answer_median, sigma, 4, answer_max),
                seed=seed,
            )
            for task in tasks or ("score", "generate"):
                repetitions = repetitions_score if task == "score" else repetitions_generate
                comparison = bench.compare(task, workload, repetitions)
                comparisons.append(comparison)
                print("\n".join(describe(comparison)), flush=True)
            del bench  # its models, before the next one's are loaded
    print("\n".join(describe_verdicts(judge(comparisons))))
    print(_describe_rates(machine.rates))
    if json is not None:
        _write_json(json, hardware, machine, comparisons)


def _describe_rates(rates: Rates) -> str:
    int8 = rates.int8_flop_per_s
    return (
        f"\nthe machine at best, in this run: reads {rates.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"multiplies fp32 at {rates.float_flop_per_s / 1e9:.0f} GFLOP/s"
        + ("" if int8 is None else f" and int8 at {int8 / 1e9:.0f} GOP/s")
    )


def _write_json(
    path: Path, hardware: dict[str, Any], machine: Machine, comparisons: Sequence[Comparison]
) -> None:
    report = {
        "machine": {**hardware, "rates": asdict(machine.rates)},
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "verdicts": [asdict(verdict) for verdict in judge(comparisons)],
    }
    path.write_text(dumps(report, indent=2) + "\n")


def _be_quiet() -> None:
    """Keep the table readable: no notes of Lightning and transformers between its lines."""
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    try:
        CLI(main, as_positional=False)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
