"""``plan``: what each strategy would need for a checkpoint on some devices; nothing is loaded."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from moe_lightning.cli import plan_placement
from moe_lightning.cli.plain_words import plain_words
from moe_lightning.errors import UsageError
from moe_lightning.experts.names import BackendName
from moe_lightning.modeling.model_sizes import measure, read_config
from moe_lightning.modeling.precision import DtypeName, choose_dtype
from moe_lightning.placement.cluster import Cluster, in_gb, parse_cluster
from moe_lightning.placement.estimates import Estimate, estimate
from moe_lightning.placement.footprint import HEADROOM, ModelSizes
from moe_lightning.placement.workload import DECODE_TOKENS, PREFILL_TOKENS
from moe_lightning.strategies.selection import Choice, select
from moe_lightning.strategies.surroundings import look_around, this_machine

TITLES = {"single": "auto (a single device)"}


def run(arguments: Sequence[str]) -> int:
    """Run the verb.

    Args:
        arguments: The command line after the verb.

    Returns:
        0, whether anything fits or not.

    Raises:
        UsageError: If an option is wrong.
        CheckpointError: If there is no such checkpoint, or no config that can be used.
    """
    if any(word.split("=")[0] == "--from" for word in arguments):
        return plan_placement.run(arguments)
    try:
        options = _parser().parse_args(list(arguments))
    except ArgumentError as error:
        raise UsageError(f"{plain_words(str(error))}\nSee all options with --help.") from error
    cluster = _cluster(options)
    training: bool = options.training
    config = read_config(options["model.checkpoint"])
    sizes = measure(
        config,
        dtype=choose_dtype(
            options["model.dtype"],
            torch.device(cluster.kind),
            config,
            is_training=training,
            precision=options["trainer.precision"],
        ),
        experts_backend="auto" if training else options["model.experts_backend"],
        device_type=cluster.kind,
        lora_rank=options["lora_rank"] if training else None,
    )
    is_mixed = training and "mixed" in options["trainer.precision"]
    rows = estimate(sizes, cluster, training=training, is_mixed=is_mixed)
    outcome: Choice | UsageError
    try:
        outcome = select(sizes, cluster, training=training, is_mixed=is_mixed)
    except UsageError as error:
        outcome = error
    if options.json:
        print(json.dumps(_as_json(sizes, cluster, rows, outcome), indent=2))
    else:
        print(_as_text(sizes, cluster, rows, outcome, training=training))
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


def _as_text(
    sizes: ModelSizes,
    cluster: Cluster,
    rows: dict[str, Estimate],
    outcome: Choice | UsageError,
    *,
    training: bool,
) -> str:
    heads = ["strategy", "on a device", "fits", *(["step"] if training else ["decode", "prefill"])]
    table = [[*heads, ""]]
    for key, row in rows.items():
        traffic = [in_gb(number) for number in row.bytes_per_token[: len(heads) - 3]]
        fits = "yes" if row.fits else "no"
        table.append(
            [TITLES.get(key, row.label), in_gb(row.device_bytes), fits, *traffic, row.why_not]
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(
            word.ljust(width) if column in (0, len(widths) - 1) else word.rjust(width)
            for column, (word, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    what = "weights, gradients and AdamW's averages" if training else "weights"
    step = (
        f"step: {PREFILL_TOKENS:,} tokens on each device"
        if training
        else f"decode: {DECODE_TOKENS} tokens a step on each device, prefill: {PREFILL_TOKENS:,}"
    )
    reasons = (
        [f"moe_auto: {line}" for line in outcome.reasons]
        if isinstance(outcome, Choice)
        else [str(outcome)]
    )
    return "\n".join(
        [
            f"{sizes.name}: {in_gb(sizes.num_bytes)} of weights in {sizes.dtype}, "
            f"{in_gb(sizes.expert_bytes)} of them experts, the largest layer "
            f"{in_gb(max(layer.num_bytes for layer in sizes.layers))}; {cluster}",
            "",
            *lines,
            "",
            f"on a device: {what} on the fullest; {HEADROOM:.0%} of its memory are kept free for "
            "activations and caches.",
            f"{step}: bytes that travel for a token, mean over the layers.",
            "",
            *reasons,
        ]
    )


def _as_json(
    sizes: ModelSizes, cluster: Cluster, rows: dict[str, Estimate], outcome: Choice | UsageError
) -> dict[str, Any]:
    chosen, reasons = None, [str(outcome)]
    if isinstance(outcome, Choice):
        chosen = {"name": outcome.name, "options": dict(outcome.estimate.options)}
        reasons = list(outcome.reasons)
    return {
        "model": sizes.name,
        "dtype": sizes.dtype,
        "total_bytes": sizes.num_bytes,
        "expert_bytes": sizes.expert_bytes,
        "dense_bytes": sizes.dense_bytes,
        "expert_bytes_by_layer": [layer.expert_bytes for layer in sizes.layers],
        "largest_layer_bytes": max(layer.num_bytes for layer in sizes.layers),
        "num_nodes": cluster.num_nodes,
        "devices_per_node": cluster.devices_per_node,
        "bytes_per_device": cluster.device_bytes,
        "room_bytes_per_device": cluster.room_bytes,
        "strategies": [
            {
                "name": row.name,
                "options": dict(row.options),
                "bytes_on_a_device": row.device_bytes,
                "fits": row.fits,
                "why_not": row.why_not,
                "bytes_per_token_and_layer": {
                    "decode": row.bytes_per_token[0],
                    "prefill": row.bytes_per_token[1],
                },
            }
            for row in rows.values()
        ],
        "choice": chosen,
        "reasons": reasons,
    }
