"""``plan``: what each strategy would need for a checkpoint on some devices; nothing is loaded."""

import json
from collections.abc import Sequence

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from moe_lightning.cli import plan_placement
from moe_lightning.cli.plain_words import plain_words
from moe_lightning.cli.plan_rates import OPTIONS, choose_rates
from moe_lightning.cli.plan_table import Plan
from moe_lightning.errors import UsageError
from moe_lightning.experts.names import BackendName
from moe_lightning.modeling.model_sizes import measure, read_config
from moe_lightning.modeling.precision import DtypeName, choose_dtype
from moe_lightning.placement.cluster import Cluster, parse_cluster
from moe_lightning.placement.estimates import estimate
from moe_lightning.placement.recording import load_recording
from moe_lightning.placement.workload import DECODE_TOKENS, PREFILL_TOKENS, Workload
from moe_lightning.strategies.selection import Choice, select
from moe_lightning.strategies.surroundings import look_around, this_machine


def run(arguments: Sequence[str]) -> int:
    """Run the verb.

    Args:
        arguments: The command line after the verb.

    Returns:
        0, whether anything fits or not.

    Raises:
        UsageError: If an option is wrong, or the recorded routing is of another model.
        CheckpointError: If there is no such checkpoint, or no config that can be used.
    """
    if any(word.split("=")[0] == "--from" for word in arguments):
        return plan_placement.run(arguments)
    try:
        options = _parser().parse_args(list(arguments))
    except ArgumentError as error:
        raise UsageError(f"{plain_words(str(error))}\nSee all options with --help.") from error
    cluster, workload = _cluster(options), _workload(options)
    training: bool = options.training
    config = read_config(options["model.checkpoint"])
    dtype = choose_dtype(
        options["model.dtype"],
        torch.device(cluster.kind),
        config,
        is_training=training,
        precision=options["trainer.precision"],
    )
    sizes = measure(
        config,
        dtype=dtype,
        experts_backend="auto" if training else options["model.experts_backend"],
        device_type=cluster.kind,
        lora_rank=options["lora_rank"] if training else None,
    )
    given = {name: options[name] for name in OPTIONS}
    rates = choose_rates(given, cluster, dtype, measures=options.devices == "auto")
    is_mixed = training and "mixed" in options["trainer.precision"]
    rows = estimate(
        sizes, cluster, training=training, is_mixed=is_mixed, workload=workload, rates=rates
    )
    outcome: Choice | UsageError
    try:
        outcome = select(sizes, cluster, training=training, is_mixed=is_mixed)
    except UsageError as error:
        outcome = error
    plan = Plan(sizes, cluster, workload, rates, rows, outcome, training)
    print(json.dumps(plan.as_dict(), indent=2) if options.json else plan.as_text())
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m moe_lightning plan",
        exit_on_error=False,
        description="Print what every strategy would need for a checkpoint on some devices, and "
        "which one moe_auto would choose. Reads config.json and headers, no weights. With --from "
        "routing.npz it plans a placement of experts instead: see --from routing.npz --help.",
    )
    parser.add_argument(
        "--model.checkpoint",
        type=str,
        default="demo",
        help="A Hugging Face directory, a hub id (only config.json is downloaded), or demo.",
    )
    parser.add_argument(
        "--devices",
        type=str,
        default="auto",
        metavar="4x80GiB",
        help="The devices: 4x80GiB is four in one machine, 2x8x80GiB eight in each of two. The "
        "default is those of this machine, and what is free on them.",
    )
    parser.add_argument(
        "--training", type=bool, default=False, help="Whether to plan fit instead of predict."
    )
    parser.add_argument(
        *("--model.dtype", "--dtype"),
        type=DtypeName,
        default="auto",
        help="Precision of the weights, as for predict and fit.",
    )
    parser.add_argument(
        *("--model.experts_backend", "--experts_backend"),
        type=BackendName,
        default="auto",
        help="How experts are computed. The backends cpu_* mean that --devices are CPUs.",
    )
    parser.add_argument(
        *("--trainer.precision", "--precision"),
        type=str,
        default="32-true",
        help="The trainer's precision, such as bf16-mixed or bf16-true.",
    )
    parser.add_argument(
        "--lora_rank",
        type=int | None,
        default=None,
        help="Rank of LoRA adapters on attention and all experts, which train instead of the "
        "weights. The default trains every weight.",
    )
    for name, (_, example, what) in OPTIONS.items():
        parser.add_argument(
            f"--{name}",
            type=str | None,
            default=None,
            metavar=example,
            help=f"{what} The default is what trying finds, if the devices are this machine's; "
            "without rates no speeds are predicted."
            if name in ("flops", "memory_bandwidth", "bandwidth")
            else what,
        )
    parser.add_argument(
        "--decode_tokens",
        type=PositiveInt,
        default=DECODE_TOKENS,
        help="Tokens of a decode step, on each process that has rows of its own.",
    )
    parser.add_argument(
        "--prefill_tokens",
        type=PositiveInt,
        default=PREFILL_TOKENS,
        help="Tokens of a pass over prompts, or of a training step, on each such process.",
    )
    parser.add_argument(
        "--routing",
        type=str | None,
        default=None,
        metavar="routing.npz",
        help="The routing.npz or routing_balance.json of a run, to count bytes with its routing. "
        "The default is uniform routing: all sets of a token's experts are equally likely.",
    )
    parser.add_argument(
        "--json",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="Whether to print JSON instead of a table.",
    )
    return parser


def _cluster(options: Namespace) -> Cluster:
    if options.devices == "auto":
        return look_around(this_machine(), num_nodes=1, training=options.training)
    is_cpu = str(options["model.experts_backend"]).startswith("cpu_")
    return parse_cluster(options.devices, kind="cpu" if is_cpu else "cuda")


def _workload(options: Namespace) -> Workload:
    routing = None if options.routing is None else load_recording(options.routing)
    return Workload(options.decode_tokens, options.prefill_tokens, routing)
