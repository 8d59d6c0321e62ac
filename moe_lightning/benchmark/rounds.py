"""Rounds: every contestant once in a process of its own, then again, the other way round."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lightning.benchmark import vllm_peer
from moe_lightning.benchmark.contestants import PLAIN, VLLM, Contestant
from moe_lightning.benchmark.processes import Ran, run_watched
from moe_lightning.benchmark.workload import Workload

PARTS = ("dispatch", "compute", "combine", "wait", "gather")  # of weights, by FSDP
Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Limits:
    """When it is enough.

    Attributes:
        rounds: Rounds at most.
        total_s: No round is begun that would end later, going by those before it; the first one is
            always run.
        each_s: Seconds after which a contestant is ended.
    """

    rounds: int = 3
    total_s: float = 600.0
    each_s: float = 300.0


@dataclass(frozen=True)
class Setup:
    """What is the same for all.

    Attributes:
        checkpoint: Directory of the checkpoint.
        dtype: Precision, by name.
        experts_backend: How experts are computed by this package.
        accelerator: ``cpu`` or ``gpu``.
        max_batch_tokens: Token budget of a batch.
        directory: Where tasks, logs and raw results go.
        vllm_python: A Python that has vLLM; None is this one.
    """

    checkpoint: str
    dtype: str
    experts_backend: str
    accelerator: str
    max_batch_tokens: int
    directory: Path
    vllm_python: str | None = None


@dataclass
class Result:
    """What a contestant did, round by round.

    Attributes:
        contestant: Who.
        why_not: Why there is nothing, or no more; empty if it went well.
        note: What else is to be said.
        rounds: Numbers of each round by name: tokens per second, seconds, bytes, microseconds.
        rows: The answers of the first round, by the row's id.
    """

    contestant: Contestant
    why_not: str = ""
    note: str = ""
    rounds: list[dict[str, float]] = field(default_factory=list)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)

    def median(self, name: str) -> float | None:
        """The median of the rounds; None if no round says."""
        values = self.values(name)
        return statistics.median(values) if values else None

    def values(self, name: str) -> list[float]:
        """What the rounds say."""
        return [numbers[name] for numbers in self.rounds if name in numbers]


def compete(
    results: Sequence[Result],
    workload: Workload,
    setup: Setup,
    limits: Limits,
    *,
    progress: Progress = lambda _number, _name: None,
) -> None:
    """Run all contestants that can run, and add to their results.

    Args:
        results: What there is of each; those with a reason why not are left out.
        workload: The rows.
        setup: What is the same for all.
        limits: When it is enough.
        progress: Called with the number of the round and the name of who is next.
    """
    begin_s = time.monotonic()
    for number in range(limits.rounds):
        took_s = time.monotonic() - begin_s
        if number and took_s * (number + 1) / number > limits.total_s:
            return
        # What the machine does meanwhile meets them in another order.
        for result in results if number % 2 == 0 else reversed(results):
            if not result.why_not:
                progress(number, result.contestant.name)
                _play(result, number, workload, setup, limits.each_s)


def _play(result: Result, number: int, workload: Workload, setup: Setup, limit_s: float) -> None:
    who = result.contestant
    out = setup.directory / f"{who.name.replace(' ', '_')}-{number}"
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("rank-*.json"):
        old.unlink()
    task = {
        "checkpoint": setup.checkpoint,
        "dtype": setup.dtype,
        "experts_backend": setup.experts_backend,
        "accelerator": setup.accelerator,
        "strategy": who.strategy,
        "options": dict(who.options),
        "num_devices": who.num_devices,
        "rows": str(workload.path),
        "max_new_tokens": workload.max_new_tokens,
        "max_batch_tokens": setup.max_batch_tokens,
        "out": str(out),
    }
    (out / "task.json").write_text(json.dumps(task, indent=1))
    command = [*_program(who, setup), str(out / "task.json")]
    ran = run_watched(command, out / "log.txt", limit_s=limit_s, environment=os.environ)
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank-*.json"))]
    if ran.why_not or not ranks:
        result.why_not = ran.why_not or "it left no result"
        return
    result.rounds.append(_numbers(ran, ranks, workload))
    result.note = next((rank["note"] for rank in ranks if "note" in rank), result.note)
    if not result.rows:
        for rank in ranks:
            for row in rank["rows"]:
                result.rows.setdefault(row["id"], {}).update(row)
    for path in out.glob("rank-*.json"):
        path.unlink()  # large, and read


def _program(who: Contestant, setup: Setup) -> list[str]:
    if who.name == VLLM:
        return [setup.vllm_python or sys.executable, vllm_peer.__file__]
    module = "plain" if who.name == PLAIN else "player"
    return [sys.executable, "-m", f"moe_lightning.benchmark.{module}"]


def _numbers(ran: Ran, ranks: Sequence[Mapping[str, Any]], workload: Workload) -> dict[str, float]:
    """What a round says."""
    phases = [rank["phases"] for rank in ranks]

    def seconds(name: str) -> float:
        both = [phase[name] for phase in phases if name in phase]
        return float(max(p["end_s"] for p in both) - min(p["begin_s"] for p in both))

    first_s = min(min(p["begin_s"] for p in phase.values()) for phase in phases)
    prefill_s, both_s = seconds("prefill"), seconds("decode")
    numbers = {
        "startup_s": first_s - ran.started_s,
        "prefill_tokens_per_s": workload.prompt_tokens / prefill_s,
        "tokens_per_s": workload.num_tokens / both_s,
        "peak_bytes": float(max(ran.peak_bytes, default=0)),
        "all_bytes": float(sum(ran.peak_bytes)),
        "num_processes": float(len(ran.peak_bytes)),
    }
    if both_s > prefill_s:  # otherwise something else had the machine
        numbers["decode_tokens_per_s"] = workload.decode_tokens / (both_s - prefill_s)
    if any(rank["device_bytes"] for rank in ranks):
        numbers["device_bytes"] = float(max(rank["device_bytes"] for rank in ranks))
    numbers |= _layers(phases, workload)
    return numbers


def _layers(phases: Sequence[Mapping[str, Any]], workload: Workload) -> dict[str, float]:
    """For a pass of a MoE layer, the mean over ranks: microseconds of its parts; and bytes that
    travelled for a token, over all layers."""
    prefill, both = _sums(phases, "prefill"), _sums(phases, "decode")
    if not both["num_passes"]:
        return {}
    # The last phase computes the prompts again.
    decode = {name: both[name] - prefill[name] for name in both}
    numbers: dict[str, float] = {}
    for phase, sums, tokens in (
        ("prefill", prefill, workload.prompt_tokens),
        ("decode", decode, workload.decode_tokens),
    ):
        for part in PARTS:
            numbers[f"{phase}_{part}_us"] = max(0.0, 1e6 * sums[part] / max(1, sums["num_passes"]))
        for kind in ("row_bytes", "weight_bytes"):
            numbers[f"{phase}_{kind}"] = sums[kind] / max(1, tokens)
    return numbers


def _sums(phases: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """Of all ranks, what a phase had in all."""
    seen = [phase[name] for phase in phases if "parts_s" in phase.get(name, {})]
    sums = {part: sum(each["parts_s"][part] for each in seen) for part in PARTS}
    for count in ("num_passes", "row_bytes", "weight_bytes"):
        sums[count] = sum(each[count] for each in seen)
    return sums
