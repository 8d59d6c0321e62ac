"""Compare one process's experts on one, two and more slots with no placement at all, in one run.

    python scripts/bench_placement.py --cache /tmp/models --json bench_placement.json
    python scripts/bench_placement.py --slots "[cpu,cpu,cpu]"
    python scripts/bench_placement.py --slots "[cuda:0,cuda:1]" --dtype bfloat16

    weights in one file ─┬─▶ local: LocalDispatcher, all experts with the router
                         ├─▶ 1 slot, 2 slots, ...: PlacementStrategy over the first of --slots
                         └─▶ all slots, balanced by recorded loads, without and with replicas

Model: a random Qwen3-MoE of 460 M parameters whose time is nearly all in its experts (hidden 768, 4
layers, 32 experts of 1536 of which 8 are used, 8 heads, 1 of keys and values). Passes: a prefill;
as many rows of one token as a decode step has; a prefill whose experts are drawn by Zipf's law, for
the placements that know about it from the loads of another prefill. In all of them the router runs,
but experts are drawn, so that no contestant's rounding changes what there is to do.

A CPU slot has one thread, and so has the main thread, which is the first slot: two slots use two
cores. The contestants take turns in random order, and the least time counts. In turns with them the
limit is measured: the slots' experts one by one and all at once, with nothing to plan, pick or add
up. Then come one layer's dispatchers without a model around them, and the cost of planning.

Where the time went comes from more runs, with bookkeeping, which are not timed otherwise. GPUs are
waited for before and after each run, and the experts' part is between CUDA events. That has not
been run on a GPU yet.
"""

import gc
import json as json_format
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from bench_experts_layers import Layer, RoutingName
from bench_experts_machine import describe_machine
from bench_placement_clock import progress, race
from bench_placement_contestants import Contestant, Hosting, Pass, check_same, draw_passes
from bench_placement_layer import measure_layer, measure_plans
from bench_placement_limit import LimitProbe
from bench_placement_report import (
    PREFILL,
    PassReport,
    describe_layer,
    describe_pass,
    describe_verdicts,
    judge,
    make_report,
)
from jsonargparse import CLI
from transformers.utils import logging as transformers_logging

from moe_lightning.demo.random_checkpoint import make_checkpoint
from moe_lightning.devices import parse_devices
from moe_lightning.errors import UsageError
from moe_lightning.experts import BackendName
from moe_lightning.placement import save_loads

PassName = Literal["prefill", "decode", "zipf"]
DtypeName = Literal["float32", "bfloat16"]
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of answers, relative to the largest value
TRACED_RUNS = 3


def compare(
    which: Pass, contestants: Sequence[Contestant], probes: Sequence[LimitProbe], *, seconds: float
) -> PassReport:
    """Check that everybody gives the same logits for a pass, and time it."""
    progress(f"{which.name}: first run of everybody")
    logits = {each.name: each.logits(which) for each in contestants}
    dtype = str(next(iter(logits.values())).dtype).removeprefix("torch.")
    differences = check_same(which.name, logits, TOLERANCE[dtype])
    del logits
    turns: dict[str, Any] = {each.name: partial(each.time, which) for each in contestants}
    for probe in probes:
        turns |= probe.turns
    times = race(turns, seconds=seconds, title=which.name)
    forwards = {each.name: times[each.name] for each in contestants}
    parts = {each.name: each.parts(which, runs=TRACED_RUNS) for each in contestants}
    limits = [probe.limit(times) for probe in probes]
    return make_report(which, contestants, forwards, differences, parts, limits)


def measure_passes(
    hosting: Hosting,
    contestants: Sequence[Contestant],
    sizes: Layer,
    *,
    names: Sequence[PassName],
    shapes: Mapping[PassName, tuple[int, int]],
    replicas: int,
    seconds: float,
    generator: torch.Generator,
) -> Iterator[PassReport]:
    """Compare contestants, and under Zipf's law those that are balanced for it, in each pass.

    Args:
        hosting: Hosts the balanced ones.
        contestants: The local one, one slot, and those with several.
        sizes: Sizes of every MoE layer.
        names: The passes.
        shapes: Rows, and tokens of each, of every pass.
        replicas: Extra copies of busy experts in each layer.
        seconds: How long each pass is measured.
        generator: Source of the draws.

    Yields:
        The report of each pass.
    """
    local, _, *several = contestants
    for name in names:
        routing: RoutingName = "zipf" if name == "zipf" else "uniform"
        label = {"prefill": PREFILL, "zipf": "prefill, Zipf routing"}.get(name, name)
        recorded, which = draw_passes(
            ["recorded", label],
            sizes,
            list(local.dispatchers),
            routing=routing,
            shape=shapes[name],
            vocab_size=hosting.view.config.vocab_size,
            device=hosting.devices[0],
            generator=generator,
        )
        balanced = []
        if routing == "zipf" and several:
            with tempfile.TemporaryDirectory() as directory:
                loads = Path(directory) / "loads.json"
                save_loads(loads, local.loads(recorded))
                balanced = hosting.balanced(loads, replicas)
        probes = [
            LimitProbe(each, sizes, which.num_tokens, dtype=hosting.dtype, generator=generator)
            for each in several
        ]
        yield compare(which, [*contestants, *balanced], probes, seconds=seconds)
        del balanced
        gc.collect()  # gigabytes of weights


def main(
    slots: list[str] | None = None,
    passes: list[PassName] | None = None,
    tokens: int = 512,
    rows: int = 4,
    decode_rows: int = 16,
    layer_tokens: list[int] | None = None,
    replicas: int = 4,
    seconds: float = 60.0,
    threads: int = 1,
    backend: BackendName = "auto",
    dtype: DtypeName = "float32",
    hidden_size: int = 768,
    num_layers: int = 4,
    num_experts: int = 32,
    expert_size: int = 1536,
    top_k: int = 8,
    num_heads: int = 8,
    num_kv_heads: int = 1,
    vocab_size: int = 1024,
    seed: int = 0,
    cache: Path | None = None,
    json: Path | None = None,
) -> None:
    """Compare one process's experts on one, two and more slots with no placement at all.

    Args:
        slots: Devices; one, two, ... and all of them are compared. The default is two slots on the
            CPU.
        passes: What is measured of the model: prefill, decode, and zipf, a prefill with few busy
            experts. The default is all.
        tokens: Tokens of a prefill.
        rows: Rows of a prefill; they divide its tokens.
        decode_rows: Rows of the decode step.
        layer_tokens: Rows of the layer by itself; the default is 1, 16, 128 and 512.
        replicas: Extra copies of busy experts in each layer, where there are any.
        seconds: How long each pass, and the layer at each number of rows, is measured; a full run
            takes about 10 times as long.
        threads: Threads of the main thread and of each CPU slot.
        backend: How experts are computed.
        dtype: Dtype of the weights.
        hidden_size: Hidden width of the model.
        num_layers: Layers of the model.
        num_experts: Experts of a layer.
        expert_size: Inner width of an expert.
        top_k: Experts of a token.
        num_heads: Heads of attention.
        num_kv_heads: Heads of keys and values.
        vocab_size: Vocabulary of the model.
        seed: Seed of all draws.
        cache: Where the model is kept between runs; the default is a temporary directory.
        json: File for all numbers.
    """
    if tokens % rows:
        raise UsageError(f"--tokens={tokens} is no multiple of --rows={rows}: change one of them.")
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    slots = slots or ["cpu", "cpu"]
    home = parse_devices(slots)[0]
    about = describe_machine(home)
    sizes = Layer("qwen3_moe", hidden_size, expert_size, num_experts, top_k)
    print(
        f"{about['cpu']}, {about['cores']} cores, {threads} threads a slot; {about['device']}, "
        f"{dtype}, experts by {backend}, >= {seconds:g} s each\n"
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items()),
        flush=True,
    )
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        checkpoint = _model(
            cache or Path(temporary),
            sizes,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            vocab_size=vocab_size,
        )
        hosting = Hosting(checkpoint, slots, threads, getattr(torch, dtype), backend)
        local = hosting.local()
        placed = [hosting.placed(num + 1) for num in range(len(slots))]
        reports = []
        for report in measure_passes(
            hosting,
            [local, *placed],
            sizes,
            names=passes or ["prefill", "decode", "zipf"],
            shapes={
                "prefill": (rows, tokens // rows),
                "decode": (decode_rows, 1),
                "zipf": (rows, tokens // rows),
            },
            replicas=replicas,
            seconds=seconds,
            generator=generator,
        ):
            print("\n".join(describe_pass(report)), flush=True)
            reports.append(report)
        points = measure_layer(
            [local, *placed[1:]],
            sizes,
            layer_tokens or [1, 16, 128, 512],
            threads=threads,
            seconds=seconds,
            dtype=hosting.dtype,
            tolerance=TOLERANCE[dtype],
            generator=generator,
        )
        plans = measure_plans(
            *(sizes, points),
            device=home,
            replicas=replicas,
            seconds=min(2.0, seconds),
            generator=generator,
        )
    print("\n".join(describe_layer(points, plans)))
    verdicts = judge(reports, points)
    print("\n".join(describe_verdicts(verdicts)))
    if json is not None:
        about |= {
            "slots": slots,
            "threads_per_slot": threads,
            "backend": backend,
            "dtype": dtype,
            "seconds_each": seconds,
            "seed": seed,
        }
        everything = {
            "machine": about,
            "model": asdict(sizes) | {"num_layers": num_layers},
            "passes": [asdict(report) for report in reports],
            "layer": [asdict(point) for point in points],
            "planning": [asdict(plan) for plan in plans],
            "acceptance": [asdict(verdict) for verdict in verdicts],
        }
        json.write_text(json_format.dumps(everything, indent=2) + "\n")


def _model(directory: Path, sizes: Layer, **others: Any) -> Path:
    numbers = (*astuple(sizes), *others.values())
    path = directory / "-".join(map(str, numbers))
    if path.exists():
        return path
    progress(f"writing a random model to {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return make_checkpoint(path, **asdict(sizes), **others)


if __name__ == "__main__":
    try:
        CLI(main, as_positional=False)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
