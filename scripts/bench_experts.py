"""Compare the ways of computing the experts of full-size layers, in one run.

    python scripts/bench_experts.py --json bench_experts.json
    scripts/make_peer_environment.sh
    python scripts/bench_experts.py --peer_python .peers/bin/python --json bench_experts.json

    rows, experts and router weights (random, fixed seed) ─┬─▶ transformers eager, grouped_mm, ...
                                                           ├─▶ moe_lightning's backends
                                                           └─▶ vLLM, ONNX Runtime (other processes)

Layers: Qwen3-30B-A3B, OLMoE-1B-7B and DeepSeek-V2-Lite as they are, a quarter of Mixtral-8x7B's
expert width, half of gpt-oss-20b's widths; no router, no shared experts. Each has 8 points: 1, 16,
128 and 512 rows, experts drawn uniformly or by Zipf's law, K different ones for each row.

All contestants take turns, so that a busy minute of the machine hits all of them, and so do the
probes of its limits: bandwidth (one row through a matrix larger than the caches, or a dot product,
whichever is faster) and products of matrices (1536 x 2048 x 2048; MKL or oneDNN, and int8). A point
is visited for two seconds at a time until it has had its time. The least time counts.
A contestant's limit is the longer of reading the weights of the distinct experts, in the bytes it
stores them in, and of its operations. Peers of other processes get their turns between pauses of
80 ms: their threads, or ours, go on spinning for some time after the last work.

With `--device cuda` the weights are bfloat16, times are between CUDA events, the bandwidth is that
of a copy, and moe-ops (Triton, `pip install moe-ops`) takes part if it can be imported. That part
has not been run on a GPU yet.
"""

import copy
import gc
import json as json_format
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from bench_experts_contestants import NAMES, Contestants
from bench_experts_layers import (
    LAYERS,
    TINY_LAYERS,
    Layer,
    Point,
    RoutingName,
    make_experts,
    make_points,
)
from bench_experts_machine import Machine, describe_machine
from bench_experts_remote import PeerError
from bench_experts_report import (
    PointReport,
    describe_peers,
    describe_point,
    describe_rates,
    describe_verdicts,
    judge,
    make_report,
)
from jsonargparse import CLI
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from moe_lightning.errors import UsageError

TOKENS = {"cpu": [1, 16, 128, 512], "cuda": [1, 4, 16, 64, 256, 1024, 4096]}
SLICE_S = 2.0  # one visit of a point


class LayerBench:
    """All points of one layer.

    Args:
        name: The model.
        layer: Its sizes.
        points: Its points.
        expected: The right answer for each point.
        contestants: Who takes part.
        machine: Probes of the machine's limits.
    """

    def __init__(
        self,
        name: str,
        layer: Layer,
        points: list[Point],
        expected: list[Tensor],
        contestants: Contestants,
        machine: Machine,
    ) -> None:
        self.name, self.layer, self.points = name, layer, points
        self.contestants, self.machine = contestants, machine
        self.times_s: list[dict[str, list[float]]] = [{} for _ in points]
        self.errors = [self._check(point, expected[point.number]) for point in points]

    def run(self, seconds: float) -> list[PointReport]:
        """Visit the points in turns until each has had so many seconds."""
        spent_s = [0.0] * len(self.points)
        while (least_s := min(spent_s)) < seconds:
            _progress(f"{self.name}: {least_s:.0f} of {seconds:g} s at each point")
            for point in self.points:
                left_s = seconds - spent_s[point.number]
                if left_s > 0:
                    spent_s[point.number] += self._visit(point, min(SLICE_S, left_s))
        return [
            make_report(
                *(self.name, self.layer, point),
                *(self.times_s[point.number], self.errors[point.number]),
                *(self.contestants.active, self.machine.rates),
            )
            for point in self.points
        ]

    def _visit(self, point: Point, seconds: float) -> float:
        self.machine.measure()
        times_s = self.times_s[point.number]
        start_s = time.perf_counter()
        while True:
            for contestant in list(self.contestants.active):
                if not contestant.takes(point):
                    continue
                try:
                    times_s.setdefault(contestant.name, []).append(contestant.turn(point))
                except PeerError as error:
                    self.contestants.drop(contestant, str(error))
            elapsed_s = time.perf_counter() - start_s
            if elapsed_s >= seconds:
                return elapsed_s

    def _check(self, point: Point, expected_TD: Tensor) -> dict[str, float]:
        """Relative errors; warms all contestants up as well."""
        _progress(f"{self.name}: first run of T = {point.tokens}, {point.routing}")
        errors = {}
        for contestant in list(self.contestants.active):
            if contestant.takes(point):
                try:
                    rows_TD = contestant.output(point).float()
                except PeerError as error:
                    self.contestants.drop(contestant, str(error))
                    continue
                error = (rows_TD - expected_TD).norm() / expected_TD.norm()
                errors[contestant.name] = float(error)
        return errors


def expected_rows(experts: nn.Module, points: list[Point]) -> list[Tensor]:
    """What transformers' eager loop computes in float32."""
    exact: Any = experts
    if next(experts.parameters()).dtype != torch.float32:
        exact = copy.deepcopy(experts).float()
    exact.config._experts_implementation = "eager"
    return [exact(p.hidden_TD.float(), p.index_TK, p.weights_TK.float()) for p in points]


def _progress(message: str) -> None:
    print(f"  {message}", file=sys.stderr, flush=True)


def main(
    models: list[str] | None = None,
    tokens: list[int] | None = None,
    routing: list[RoutingName] | None = None,
    contestants: list[str] | None = None,
    seconds: float = 40.0,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
    peer_python: str | None = None,
    seed: int = 0,
    read_mb: int = 512,
    json: Path | None = None,
) -> None:
    """Compare the ways of computing the experts of full-size layers, in one run.

    Args:
        models: Which layers; the default is all.
        tokens: Numbers of rows; the default is 1, 16, 128 and 512, and on CUDA 1 to 4096.
        routing: How experts are drawn; the default is uniform and zipf (exponent 1).
        contestants: Who takes part; the default is all for the device.
        seconds: How long each point is measured; a full run takes 40 points times as long on a CPU.
        device: Where experts are computed: in float32 on cpu, in bfloat16 on cuda.
        threads: Threads of torch and of the peers; the default is torch's.
        peer_python: Interpreter of the environment that scripts/make_peer_environment.sh makes; the
            default is to leave vLLM and ONNX Runtime out.
        seed: Seed of weights, rows and routing.
        read_mb: Size of the matrix whose reading gives the bandwidth, in MB; more than the caches.
        json: File for all numbers.
    """
    chosen = _choose_layers(models)
    names = _choose_contestants(contestants, device)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device=cuda: PyTorch sees no GPU here. Leave it out, or use cpu.")
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
    where = torch.device(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    about = describe_machine(where)
    print(
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads; {about['device']}, "
        f"{dtype}, >= {seconds:g} s a point\n"
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items()),
        flush=True,
    )
    reports: list[PointReport] = []
    layers = {}
    for name, layer in chosen.items():
        points = make_points(
            layer,
            tokens=tokens or TOKENS[device],
            routings=routing or ["uniform", "zipf"],
            seed=seed,
            device=where,
            dtype=dtype,
        )
        experts = make_experts(layer, seed=seed, device=where, dtype=dtype)
        machine = Machine(where, dtype, read_mb << 20)
        with torch.inference_mode(), tempfile.TemporaryDirectory() as directory:
            expected = expected_rows(experts, points)
            taking_part = Contestants(
                layer, experts, points, names, peer_python=peer_python, directory=Path(directory)
            )
            try:
                bench = LayerBench(name, layer, points, expected, taking_part, machine)
                found = bench.run(seconds)
            finally:
                taking_part.close()
        about["versions"] |= taking_part.versions
        layers[name] = {
            "sizes": asdict(layer),
            "rates": asdict(machine.rates),
            "absent": taking_part.absent,
            "times_s": bench.times_s,
        }
        print(f"\n{name}: {describe_rates(machine.rates)}")
        for absent, reason in taking_part.absent.items():
            print(f"  without {absent}: {reason}")
        for report in found:
            print("\n".join(describe_point(report)), flush=True)
        reports += found
        del experts, expected, taking_part, bench, machine
        gc.collect()  # gigabytes of weights
    verdicts = judge(reports)
    print("\n".join([*describe_verdicts(verdicts), *describe_peers(reports)]))
    if json is not None:
        everything = {
            "machine": about,
            "dtype": str(dtype),
            "seconds_per_point": seconds,
            "seed": seed,
            "layers": layers,
            "points": [asdict(report) for report in reports],
            "acceptance": [asdict(verdict) for verdict in verdicts],
        }
        json.write_text(json_format.dumps(everything, indent=2) + "\n")


def _choose_layers(models: list[str] | None) -> dict[str, Layer]:
    known = LAYERS | TINY_LAYERS
    for name in models or ():
        if name not in known:
            raise UsageError(f"--models: {name!r} is unknown; choose from {', '.join(LAYERS)}.")
    return {name: known[name] for name in models or LAYERS}


def _choose_contestants(chosen: list[str] | None, device: str) -> list[str]:
    for name in chosen or ():
        if name not in NAMES[device]:
            raise UsageError(
                f"--contestants: {name!r} does not take part on {device}; choose from "
                f"{', '.join(NAMES[device])}."
            )
    return [name for name in NAMES[device] if chosen is None or name in chosen]


if __name__ == "__main__":
    try:
        CLI(main, as_positional=False)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
