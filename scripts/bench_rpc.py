"""Compare ways of asking experts on workers, over two transports, on loopback and a slow link.

    python scripts/bench_rpc.py --cache /tmp/models --json bench_rpc.json --markdown bench_rpc.md
    python scripts/bench_rpc.py --quick
    python scripts/bench_rpc.py --layer       # one layer alone, with nothing computed

                     ┌─ naive: a call for each expert and layer, float32, the master waits
    the same model,  ├─ one call for each worker, no overlap
    rows, 2 workers ─┼─ one call, overlap: parts of the batch take turns, shared experts meanwhile
                     ├─ ... and bfloat16 on the wire
                     └─ ... and int8 on the wire

Each for zmq and tensorpipe, on loopback and between two network namespaces (scripts/link.py: 2 ms
round trip, 1 Gbit/s each way; root only, said so and left out elsewhere). Workers and masters are
processes; zmq across the link has keys, and so is encrypted. Passes: score (prefill) and generate
(decode). All take turns in random order; medians count. Peers: the naive way, and one device that
holds everything.

Model: a random GLM-4-MoE of about 210 M parameters (hidden 1024, 6 layers, 64 experts of 128 of
which 8 are used, shared experts of 2048). Master and workers have one thread each, and here share
the cores of one machine.

The bound is max(dense time, expert time, bytes / rate): the model without its experts, timed in the
same rounds; the slower worker of each layer, as the workers say, while the master waits; what plain
TCP streams carried both ways at once just before. On this one machine (dense + all experts) / cores
is a bound as well, printed apart.
"""

import json as json_format
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from bench_experts_machine import describe_machine as machine
from bench_rpc_layer import LayerSizes, describe_layer, measure_layer
from bench_rpc_measure import Rate, measure_pass
from bench_rpc_places import Place, make_place, probe_place
from bench_rpc_report import (
    Verdict,
    describe_machine,
    describe_pass,
    describe_rates,
    describe_verdicts,
    judge_layer,
    judge_passes,
)
from bench_rpc_scenes import start_cast
from bench_rpc_workload import QUICK_MODEL, QUICK_SHAPES, ModelSizes, PassShape
from jsonargparse import ArgumentParser
from link import Link

from moe_lightning.errors import UsageError
from moe_lightning.experts import BackendName
from moe_lightning.transport.keys import new_keys

PlaceName = Literal["loopback", "link"]
TransportName = Literal["zmq", "tensorpipe"]


@dataclass(frozen=True)
class Options:
    """Compare ways of asking experts on workers.

    Attributes:
        places: Where; the default is loopback, and link where there can be one.
        transports: By what.
        rounds: Timed runs of everybody; 5 at least for numbers worth telling.
        traced_rounds: More runs of everybody, with bookkeeping, to see where time and bytes go.
        delay_ms: Milliseconds that a packet takes across the link, one way.
        rate_gbit: Gigabits per second of the link, each way.
        model: Sizes of the model.
        prefill: Rows to score.
        decode: Rows to generate together.
        micro_batches: Parts of a batch that take turns where there is overlap.
        num_workers: Workers; each holds a block of every layer's experts.
        threads: Threads of every master and worker; one device alone has all cores.
        backend: How experts are computed.
        alone: Sizes of the one layer of --layer.
        layer_seconds: How long it is measured at each place.
        seed: Seed of the rows.
        cache: Where the model is kept between runs; the default is a temporary directory.
        json: File for all numbers.
        markdown: File for what is printed.
    """

    places: list[PlaceName] | None = None
    transports: list[TransportName] = field(default_factory=lambda: ["zmq", "tensorpipe"])
    rounds: int = 7
    traced_rounds: int = 3
    delay_ms: float = 1.0
    rate_gbit: float = 1.0
    model: ModelSizes = field(default_factory=ModelSizes)
    prefill: PassShape = field(default_factory=lambda: PassShape(8, 64))
    decode: PassShape = field(default_factory=lambda: PassShape(16, 8, 16))
    micro_batches: int = 2
    num_workers: int = 2
    threads: int = 1
    backend: BackendName = "auto"
    alone: LayerSizes = field(default_factory=LayerSizes)
    layer_seconds: float = 30.0
    seed: int = 0
    cache: Path | None = None
    json: Path | None = None
    markdown: Path | None = None


class Report:
    """Collects what is printed, and all numbers.

    Args:
        about: The machine.
    """

    def __init__(self, about: dict[str, Any]) -> None:
        self.lines: list[str] = []
        self.numbers: dict[str, Any] = {"machine": about}
        self.verdicts: list[Verdict] = []

    def say(self, *lines: str) -> None:
        """Print and keep lines."""
        print("\n".join(lines), flush=True)
        self.lines.extend(lines)

    def write(self, options: Options) -> None:
        """Judge, and write the files."""
        self.say(*describe_verdicts(self.verdicts))
        self.numbers["acceptance"] = [asdict(verdict) for verdict in self.verdicts]
        if options.json is not None:
            options.json.write_text(json_format.dumps(self.numbers, indent=2) + "\n")
        if options.markdown is not None:
            options.markdown.write_text("\n".join(self.lines) + "\n")


def main(options: Options, *, layer: bool, quick: bool) -> None:
    """Measure, print and write.

    Args:
        options: The options.
        layer: Whether to measure one layer alone instead of whole passes.
        quick: Whether to look only whether everything runs.
    """
    about = machine(torch.device("cpu")) | {"threads": options.threads, "seed": options.seed}
    report = Report(about)
    report.say(*describe_machine(about))
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        keys = Path(temporary) / "keys"
        new_keys(keys)
        links = {"delay_ms": options.delay_ms, "rate_gbit": options.rate_gbit}
        places = [
            stack.enter_context(make_place(name, keys=keys, **links))
            for name in choose_places(options.places, report.say)
        ]
        probes = {place.name: probe_place(place, seconds=0.3 if quick else 2.0) for place in places}
        report.say(*describe_rates(probes))
        report.numbers["probes"] = probes
        if layer:
            measure_layers(options, places, report, quick=quick)
        else:
            rates = {name: Rate.of(probe) for name, probe in probes.items()}
            checkpoint = (QUICK_MODEL if quick else options.model).checkpoint(
                options.cache or Path(temporary)
            )
            measure_passes(options, places, rates, checkpoint, report, stack=stack, quick=quick)
    report.write(options)


def measure_layers(
    options: Options, places: Sequence[Place], report: Report, *, quick: bool
) -> None:
    """One layer alone, at every place."""
    report.numbers["layer"] = []
    for place in places:
        measured = measure_layer(
            place,
            options.alone,
            seconds=1.0 if quick else options.layer_seconds,
            seed=options.seed,
            has_tensorpipe="tensorpipe" in options.transports,
        )
        report.say("", *describe_layer(measured, options.alone))
        report.verdicts += judge_layer(measured)
        report.numbers["layer"].append(asdict(measured))


def measure_passes(
    options: Options,
    places: Sequence[Place],
    rates: dict[str, Rate],
    checkpoint: Path,
    report: Report,
    *,
    stack: ExitStack,
    quick: bool,
) -> None:
    """Whole passes, everybody in turns."""
    model = QUICK_MODEL if quick else options.model
    shapes = QUICK_SHAPES if quick else {"prefill": options.prefill, "decode": options.decode}
    num_cores = report.numbers["machine"]["cores"]
    cast = start_cast(
        stack,
        places,
        options.transports,
        options={
            "checkpoint": str(checkpoint),
            "backend": options.backend,
            "micro_batches": options.micro_batches,
            "passes": {
                name: shape.draw(model.vocab_size, options.seed) for name, shape in shapes.items()
            },
        },
        num_workers=options.num_workers,
        threads=options.threads,
        threads_alone=num_cores,
    )
    report.numbers |= {"model": asdict(model), "passes": []}
    for name, shape in shapes.items():
        measured = measure_pass(
            cast,
            name,
            shape,
            rates,
            rounds=1 if quick else options.rounds,
            traced_rounds=1 if quick else options.traced_rounds,
            num_layers=model.num_layers,
            num_cores=num_cores,
        )
        report.say(*describe_pass(measured))
        report.verdicts += judge_passes(measured)
        report.numbers["passes"].append(asdict(measured))


def choose_places(
    wanted: Sequence[PlaceName] | None, say: Callable[[str], None]
) -> Sequence[PlaceName]:
    """The places that there can be.

    Args:
        wanted: What was asked for; None for all that can be had.
        say: Called if the link is left out.

    Returns:
        The places.

    Raises:
        UsageError: If the link was asked for, and there can be none.
    """
    reason = None if wanted is not None and "link" not in wanted else Link.available()
    if reason is None:
        return wanted or ["loopback", "link"]
    if wanted is not None:
        raise UsageError(f"--places: no link can be made: {reason}.")
    say(f"LEFT OUT: everything behind a slow link, since none can be made: {reason}.")
    return ["loopback"]


def _parse() -> tuple[Options, bool, bool]:
    parser = ArgumentParser(
        description="Compare ways of asking experts on workers, over two transports, on loopback "
        "and a slow link (root only). On two quiet cores a full run takes about 10 minutes, "
        "--layer about 3, --quick 1. What is compared how: the top of this file."
    )
    for name, what in (
        ("--layer", "Measure one layer alone instead, with nothing computed."),
        ("--quick", "Only look whether everything runs: a small model, one round."),
    ):
        parser.add_argument(name, type=bool, nargs="?", const=True, default=False, help=what)
    parser.add_class_arguments(Options)
    parsed = parser.instantiate_classes(parser.parse_args())
    options = Options(**{each.name: parsed[each.name] for each in fields(Options)})
    return options, parsed.layer, parsed.quick


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    try:
        given, is_layer, is_quick = _parse()
        main(given, layer=is_layer, quick=is_quick)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
