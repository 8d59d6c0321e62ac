"""``plan --from``: a placement of experts from the routing of an earlier run."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentError, ArgumentParser

from moe_lightning.cli.plain_words import plain_words
from moe_lightning.errors import UsageError
from moe_lightning.placement import ExpertPlacement, imbalance, linear
from moe_lightning.placement.coactivation import slots_per_row
from moe_lightning.placement.few_moves import num_moves
from moe_lightning.placement.planner import Objective, PlanRequest, plan_placement, to_held
from moe_lightning.placement.recording import Recording, load_recording

# Not placement.json, which is what the run that was recorded has used.
_DEFAULT_NAME = "planned_placement.json"
_MAX_LAYERS = 8  # in the table; of more, the worst are shown


def run(arguments: Sequence[str]) -> int:
    """Run the verb with ``--from``.

    Args:
        arguments: The command line after the verb.

    Returns:
        0.

    Raises:
        UsageError: If an option or a file is wrong.
    """
    try:
        options = _parser().parse_args(list(arguments))
    except ArgumentError as error:
        raise UsageError(
            f"{plain_words(str(error))}\nSee all options with --from FILE --help."
        ) from error
    recording = load_recording(options["from"])
    loads = recording.total()
    target = Path(options.to or Path(options["from"]).with_name(_DEFAULT_NAME))
    if target.exists() and not options.overwrite:
        raise UsageError(
            f"{target}: exists already, so nothing was planned. Give another file with --to, or "
            "--overwrite."
        )
    current = None if options.current is None else ExpertPlacement.load(options.current)
    num_experts = {layer: len(row) for layer, row in loads.items()}
    if current is not None:
        current.check(num_experts, options.slots, name=options.current)
    request = PlanRequest(
        num_slots=options.slots,
        num_replicas=options.replicas,
        num_nodes=options.nodes,
        num_groups=options.groups,
        slot_speeds=options.slot_speeds,
        slack=options.slack,
        max_moves=options.max_moves,
        objective=options.objective,
    )
    # One line on a terminal, since large models take some seconds.
    if sys.stderr.isatty():
        print(f"planning {len(loads)} layers ...", end="\r", file=sys.stderr)
    placement = plan_placement(loads, request, current=current, together=recording.together)
    placement.save(target)
    before = linear(num_experts, options.slots) if current is None else current
    report = _report(recording, before, placement, request)
    report["before"] = "linear" if current is None else str(options.current)
    report["file"] = str(target)
    print(json.dumps(report, indent=2) if options.json else _as_text(report, request))
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m moe_lightning plan",
        exit_on_error=False,
        description="Plan from the routing of an earlier run which slot (device, worker or rank) "
        "holds which experts, and write a placement that moe_placement, moe_rpc and moe_ep take.",
    )
    parser.add_argument(
        "--from",
        type=str,
        required=True,
        metavar="routing.npz",
        help="The routing.npz or routing_balance.json of a run.",
    )
    parser.add_argument(
        "--slots",
        type=int,
        required=True,
        help="Number of slots: devices of moe_placement, workers of moe_rpc, ranks of moe_ep.",
    )
    parser.add_argument(
        "--replicas",
        type=int,
        default=0,
        help="Extra copies of busy experts in each layer. They take memory and even out the load.",
    )
    parser.add_argument(
        "--nodes",
        type=int,
        default=1,
        help="Machines that the slots are on, in order. Machines are balanced first, and all "
        "copies of an expert stay on one.",
    )
    parser.add_argument(
        "--groups",
        type=int | None,
        default=None,
        help="For routers that choose groups of experts first (DeepSeek's n_group): groups that "
        "stay on one machine together. The default is that every expert is its own.",
    )
    parser.add_argument(
        "--slot_speeds",
        type=list[float] | None,
        default=None,
        help="How fast each slot is, in any unit, such as [1,1,2,2]. The default is equally fast.",
    )
    parser.add_argument(
        "--current",
        type=str | None,
        default=None,
        metavar="placement.json",
        help="The placement in use; few experts are put elsewhere then. The default is none.",
    )
    parser.add_argument(
        "--max_moves",
        type=int | None,
        default=None,
        help="Copies of experts at most, over all layers, that are put where --current does not "
        "have them. The default is any number.",
    )
    parser.add_argument(
        "--slack",
        type=float,
        default=0.02,
        help="How much more than with the best plan the busiest slot may get to do, to save moves "
        "or traffic: 0.02 is 2 percent.",
    )
    parser.add_argument(
        "--objective",
        type=Objective,
        default="balance",
        help="balance, or traffic to also bring together experts that are chosen together, so "
        "that rows go to fewer slots. That needs a routing.npz which says which are.",
    )
    parser.add_argument(
        "--to",
        type=str | None,
        default=None,
        metavar="FILE",
        help="Where to write the placement. The default is planned_placement.json beside the "
        "recording.",
    )
    for name, what in (
        ("--overwrite", "Whether to replace the file if it exists."),
        ("--json", "Whether to print JSON instead of a table."),
    ):
        parser.add_argument(name, type=bool, nargs="?", const=True, default=False, help=what)
    return parser


def _report(
    recording: Recording, before: ExpertPlacement, after: ExpertPlacement, request: PlanRequest
) -> dict[str, Any]:
    moves, layers = {}, {}
    old, new = (_max_over_mean(recording, each, request) for each in (before, after))
    for layer in after.layers:
        held_ES, was_ES = (
            to_held(each.slots[layer], request.num_slots) for each in (after, before)
        )
        moves[layer] = [num_moves(held_ES[:, [s]], was_ES[:, [s]]) for s in range(held_ES.shape[1])]
        layers[str(layer)] = {
            "max_over_mean_before": old[layer][0],
            "max_over_mean": new[layer][0],
            "max_over_mean_worst_interval": new[layer][1],
            "num_moves": sum(moves[layer]),
        }
        both_EE = recording.together.get(layer)
        if both_EE is not None:
            layers[str(layer)]["slots_per_row_before"] = slots_per_row(was_ES, both_EE)
            layers[str(layer)]["slots_per_row"] = slots_per_row(held_ES, both_EE)
    return {
        "num_slots": request.num_slots,
        "num_replicas": after.num_replicas,
        "num_intervals": max((len(each) for each in recording.loads.values()), default=0),
        "num_moves": sum(map(sum, moves.values())),
        "num_moves_by_slot": [sum(each) for each in zip(*moves.values(), strict=True)],
        "layers": layers,
    }


def _max_over_mean(
    recording: Recording, placement: ExpertPlacement, request: PlanRequest
) -> dict[int, tuple[float, float]]:
    """Of each layer the whole run's, and the worst interval's."""
    speeds = request.slot_speeds
    loads = {layer: each.astype(np.float64) for layer, each in recording.loads.items()}
    whole = imbalance(placement, {n: each.sum(axis=0) for n, each in loads.items()}, speeds=speeds)
    worst = dict.fromkeys(whole, 1.0)
    for layer, loads_IE in loads.items():
        one = ExpertPlacement(placement.num_slots, {layer: placement.slots[layer]})
        for load_E in loads_IE:
            worst[layer] = max(worst[layer], imbalance(one, {layer: load_E}, speeds=speeds)[layer])
    return {layer: (whole[layer], worst[layer]) for layer in whole}


def _as_text(report: Mapping[str, Any], request: PlanRequest) -> str:
    layers: dict[str, dict[str, float]] = report["layers"]
    has_traffic = any("slots_per_row" in row for row in layers.values())
    heads = [
        "layer",
        "before",
        "after",
        *(["worst interval"] if report["num_intervals"] > 1 else []),
    ]
    heads += ["moved", *(["slots per row"] if has_traffic else [])]

    def line(name: str, row: Mapping[str, float]) -> list[str]:
        words = [name, f"{row['max_over_mean_before']:.3f}", f"{row['max_over_mean']:.3f}"]
        if report["num_intervals"] > 1:
            words.append(f"{row['max_over_mean_worst_interval']:.3f}")
        words.append(f"{row['num_moves']:,}")
        if has_traffic and "slots_per_row" in row:
            words.append(f"{row['slots_per_row_before']:.2f} to {row['slots_per_row']:.2f}")
        return words + [""] * (len(heads) - len(words))

    by_badness = sorted(layers, key=lambda name: (-layers[name]["max_over_mean"], int(name)))
    shown = sorted(by_badness[:_MAX_LAYERS], key=int)
    names = list(next(iter(layers.values()), {}))
    totals = {name: [row[name] for row in layers.values() if name in row] for name in names}
    worst = {name: max(each) for name, each in totals.items()}
    mean = {name: sum(each) / len(each) for name, each in totals.items()}
    moved = {"num_moves": report["num_moves"]}
    table = [heads, *(line(name, layers[name]) for name in shown)]
    table += [line("worst", worst | moved), line("mean", mean | moved)]
    table[-2][heads.index("moved")] = ""
    widths = [max(len(words[column]) for words in table) for column in range(len(heads))]
    lines = [
        "  ".join(word.rjust(width) for word, width in zip(words, widths, strict=True)).rstrip()
        for words in table
    ]
    before = report["before"]
    cut = f" (the {len(shown)} worst of {len(layers)})" if len(shown) < len(layers) else ""
    busiest = max(report["num_moves_by_slot"], default=0)
    return "\n".join(
        [
            f"{len(layers)} MoE layers on {request.num_slots} slots, "
            f"{report['num_replicas']:,} replicas.",
            f"Load of the busiest slot over the mean, 1 is best; before is {before}{cut}:",
            "",
            *lines,
            "",
            f"moved: copies of experts on a slot that does not have them before; "
            f"{busiest:,} at most on one slot. In the last line, all layers'.",
            *(["slots per row: slots that a row goes to, estimated from pairs."] * has_traffic),
            "",
            f"Written to {report['file']}. To use it, with slots, workers or ranks as many as "
            f"{request.num_slots}:",
            *(
                f"  --trainer.strategy {name} {option}--trainer.strategy.file {report['file']}"
                for name, option in (
                    ("moe_placement", ""),
                    ("moe_rpc", ""),
                    ("moe_ep", "--trainer.strategy.policy file "),
                )
            ),
        ]
    )
