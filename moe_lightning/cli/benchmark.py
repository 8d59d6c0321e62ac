"""``benchmark``: strategies side by side on this machine."""

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from tqdm import tqdm

import moe_lightning
from moe_lightning.benchmark import Limits, Result, Setup, compete, contestants, make_workload
from moe_lightning.benchmark.report import Report
from moe_lightning.cli.plain_words import plain_words
from moe_lightning.devices import free_bytes
from moe_lightning.errors import UsageError
from moe_lightning.experts.names import BackendName
from moe_lightning.modeling.model_sizes import measure
from moe_lightning.modeling.precision import DtypeName, choose_dtype
from moe_lightning.module import MoELightningModule
from moe_lightning.placement.cluster import Cluster, in_gb
from moe_lightning.placement.footprint import ModelSizes
from moe_lightning.strategies.surroundings import this_machine

VERSIONS = ("torch", "transformers", "lightning")
LEAST = {"num_rows": 1, "num_prompt_tokens": 2, "max_new_tokens": 2, "rounds": 1}


def run(arguments: Sequence[str]) -> int:
    """Run the verb.

    Args:
        arguments: The command line after the verb.

    Returns:
        0 if everybody who was to run did, 1 if one failed, 5 if it was interrupted.

    Raises:
        UsageError: If an option is wrong.
        CheckpointError: If the checkpoint cannot be used.
    """
    try:
        options = _parser().parse_args(list(arguments))
    except ArgumentError as error:
        raise UsageError(f"{plain_words(str(error))}\nSee all options with --help.") from error
    _check(options)
    directory = Path(options.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    report, is_interrupted = _measure(options, directory)
    report.write(directory)
    print(report.as_text())
    print(f"benchmark: {directory}/benchmark.md, .json and .png", file=sys.stderr)
    if is_interrupted:
        raise KeyboardInterrupt
    return int(any(each.why_not and not each.contestant.why_not for each in report.results))


def _measure(options: Namespace, directory: Path) -> tuple[Report, bool]:
    module = MoELightningModule(options["model.checkpoint"])
    config, cluster = module.view.config, _cluster(options.devices)
    dtype = choose_dtype(
        options["model.dtype"],
        torch.device(cluster.kind),
        config,
        is_training=False,
        precision="32-true",
    )
    sizes = measure(
        config,
        dtype=dtype,
        experts_backend=options["model.experts_backend"],
        device_type=cluster.kind,
    )
    everybody = contestants(
        sizes, cluster, only=options.only or (), vllm_python=options.vllm_python
    )
    workload = make_workload(
        directory / "rows.jsonl",
        module.encoder,
        source=options["data.input"],
        num_rows=options.num_rows,
        num_prompt_tokens=options.num_prompt_tokens,
        max_new_tokens=options.max_new_tokens,
    )
    setup = Setup(
        checkpoint=str(module.view.path),
        dtype=sizes.dtype,
        experts_backend=options["model.experts_backend"],
        accelerator="gpu" if cluster.kind == "cuda" else "cpu",
        max_batch_tokens=options["data.max_batch_tokens"],
        directory=directory / "runs",
        vllm_python=options.vllm_python,
    )
    limits = Limits(options.rounds, 60 * options.minutes, options.limit_s)
    results = [Result(each, each.why_not) for each in everybody]
    is_interrupted = False
    with _Bar(results, limits.rounds) as bar:
        try:
            compete(results, workload, setup, limits, progress=bar.show)
        except KeyboardInterrupt:  # what there is until then is shown
            is_interrupted = True
    about = {
        "model": f"{options['model.checkpoint']}: {sizes.name}, {in_gb(sizes.num_bytes)} in "
        f"{sizes.dtype}, {in_gb(sizes.expert_bytes)} of them experts",
        "rows": f"{workload.num_rows} of {min(workload.num_prompt_tokens)} to "
        f"{max(workload.num_prompt_tokens)} tokens, {workload.max_new_tokens} new tokens each",
        "machine": _machine(cluster),
        "versions": ", ".join(
            [
                f"moe_lightning {moe_lightning.__version__}",
                f"Python {platform.python_version()}",
                *(f"{name} {version(name)}" for name in VERSIONS),
            ]
        ),
    }
    return Report(results, workload, _num_moe_layers(sizes), about), is_interrupted


def _num_moe_layers(sizes: ModelSizes) -> int:
    return sum(1 for layer in sizes.layers if layer.num_experts)


def _cluster(num_devices: int | None) -> Cluster:
    """The devices that strategies are to use: GPUs, or processes of the CPU."""
    devices = this_machine()
    on_gpus = devices[0].type == "cuda"
    if on_gpus and num_devices is not None and num_devices > len(devices):
        raise UsageError(f"--devices {num_devices}, but this machine has {len(devices)} GPUs.")
    number = num_devices or (len(devices) if on_gpus else 2)
    host = free_bytes(torch.device("cpu"))
    if on_gpus:
        each = min(free_bytes(device) for device in devices[:number])
        return Cluster(1, number, each, "cuda", host)
    return Cluster(1, number, host // number, "cpu")


def _machine(cluster: Cluster) -> str:
    memory = in_gb(psutil.virtual_memory().total)
    if cluster.kind == "cuda":
        return f"{cluster.num_devices}x {torch.cuda.get_device_name(0)}; host with {memory}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_name()}, {cores} cores, {memory}; {cluster.num_devices} processes share it"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class _Bar:
    """Who runs, on stderr."""

    def __init__(self, results: Sequence[Result], num_rounds: int) -> None:
        total = num_rounds * sum(1 for each in results if not each.why_not)
        self._bar = tqdm(total=total, desc="benchmark", file=sys.stderr, leave=False, unit="run")
        self._has_begun = False

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, number: int, name: str) -> None:
        """Say who is next."""
        self._bar.update(int(self._has_begun))
        self._has_begun = True
        self._bar.set_postfix_str(f"round {number + 1}: {name}")


def _check(options: Namespace) -> None:
    for name, least in LEAST.items():
        if options[name] < least:
            raise UsageError(f"--{name} is {options[name]}, but it must be at least {least}.")
    for name in ("minutes", "limit_s"):
        if not options[name] > 0:
            raise UsageError(f"--{name} is {options[name]}, but it must be above 0.")
    if options.devices is not None and options.devices < 1:
        raise UsageError(f"--devices is {options.devices}, but it must be at least 1.")
    if options["data.max_batch_tokens"] < 1:
        raise UsageError("--data.max_batch_tokens must be at least 1.")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m moe_lightning benchmark",
        exit_on_error=False,
        description="Run every strategy that this machine can, on the same rows, each in processes "
        "of its own, round after round, beside plain transformers and vLLM if it is installed. "
        "Prints a table, and writes it as benchmark.md, .json and .png.",
    )
    add = parser.add_argument
    add(
        "--model.checkpoint",
        type=str,
        default="demo",
        help="A Hugging Face directory, a hub id, or demo.",
    )
    add(
        *("--model.dtype", "--dtype"),
        type=DtypeName,
        default="auto",
        help="Precision of the weights: float32 on a CPU, the checkpoint's on GPUs.",
    )
    add(
        *("--model.experts_backend", "--experts_backend"),
        type=BackendName,
        default="auto",
        help="How experts are computed by this package.",
    )
    add(
        "--data.input",
        type=str,
        default="demo",
        help="A file of prompts, as for predict; its first rows are used. demo: rows made of the "
        "shipped prompts.",
    )
    add(
        "--data.max_batch_tokens",
        type=int,
        default=16384,
        help="Tokens of one batch, padding included.",
    )
    add("--num_rows", type=int, default=32, help="Rows that everybody answers.")
    add("--num_prompt_tokens", type=int, default=128, help="Tokens that prompts are cut to.")
    add("--max_new_tokens", type=int, default=16, help="Tokens that are generated for each row.")
    add("--rounds", type=int, default=3, help="Rounds at most; medians are shown.")
    add(
        "--minutes",
        type=float,
        default=12.0,
        help="No round is begun that would probably end later; the first is always run.",
    )
    add("--limit_s", type=float, default=300.0, help="Seconds after which one run is ended.")
    add(
        "--only",
        type=list[str] | None,
        default=None,
        help='Who takes part, such as "[placement, rpc zmq]", beside one device. null: all.',
    )
    add(
        "--devices",
        type=int | None,
        default=None,
        help="Devices, or processes of the CPU. null: all GPUs, or two processes.",
    )
    add(
        "--vllm_python",
        type=str | None,
        default=None,
        help="A Python that has vLLM. null: this one, if it has.",
    )
    add(
        "--output_dir",
        type=str,
        default="./outputs/benchmark",
        help="Where everything goes, the logs of all runs too.",
    )
    return parser
