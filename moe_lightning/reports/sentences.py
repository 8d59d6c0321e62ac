"""What a person should know of a run before any table."""

from collections.abc import Mapping
from typing import Any

from moe_lightning.reports.units import in_percent, in_seconds

EVEN_ENOUGH = 1.5
MUCH_WAITING = 0.1


def sentences(
    run: Mapping[str, Any], routing: Mapping[str, Any], communication: Mapping[str, Any]
) -> list[dict[str, str]]:
    """The verdicts.

    Args:
        run: The content of ``run.json``; each may be empty.
        routing: That of ``routing_balance.json``.
        communication: That of ``communication_time.json``.

    Returns:
        For each its ``kind`` (``good``, ``bad`` or ``plain``) and ``text``.
    """
    found = []
    if run.get("exit_reason"):
        found += _of_run(run)
    if routing.get("layers"):
        found += _of_routing(routing)
    if communication.get("layers"):
        found += _of_communication(communication)
    return [{"kind": kind, "text": text} for kind, text in found]


def _of_run(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    if run["exit_reason"] != "finished":
        return [("bad", f"The run did not finish: {run['exit_reason']}.")]
    if "num_predictions" not in run:
        return [("good", f"The run finished in {in_seconds(run['elapsed_s'])}.")]
    text = (
        f"{run['num_predictions']:,} of {run['num_rows']:,} rows answered in "
        f"{in_seconds(run['elapsed_s'])}, {run['tokens_per_s']:,.0f} tokens/s."
    )
    if not run["num_errors"]:
        return [("good", text)]
    return [("bad", f"{text} {run['num_errors']:,} could not be computed: see errors.jsonl.")]


def _of_routing(routing: Mapping[str, Any]) -> list[tuple[str, str]]:
    layers = routing["layers"]
    mean = sum(row["max_over_mean"] for row in layers.values()) / len(layers)
    worst = max(layers, key=lambda name: layers[name]["max_over_mean"])
    num_dead = sum(len(row["dead_experts"]) for row in layers.values())
    evenly = "evenly" if mean <= EVEN_ENOUGH else "unevenly"
    text = (
        f"Rows are spread {evenly} over experts: the busiest of a layer has {mean:.2f} times the "
        f"mean, {layers[worst]['max_over_mean']:.2f} times at worst (layer {worst})."
    )
    if num_dead:
        text += f" {num_dead:,} experts had no row."
    found = [("good" if mean <= EVEN_ENOUGH else "bad", text)]
    per_slot = routing.get("slot_max_over_mean") or {}
    if per_slot:
        worst = max(per_slot, key=lambda name: per_slot[name])
        mean = sum(per_slot.values()) / len(per_slot)
        found.append(
            (
                "good" if mean <= 1.15 else "bad",
                f"The busiest slot has {mean:.2f} times the mean of a layer's rows, "
                f"{per_slot[worst]:.2f} times at worst (layer {worst})."
                + ("" if mean <= 1.15 else " plan --from routing.npz evens that out."),
            )
        )
    return found


def _of_communication(communication: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    moe_s, wall_s = communication["moe_s"], communication["wall_s"]
    wait_s = sum(row["wait_s"] for row in communication["layers"].values())
    total_s = sum(row["total_s"] for row in communication["layers"].values())
    share = wait_s / total_s if total_s else 0.0
    if wall_s:
        found.append(
            (
                "bad" if share > MUCH_WAITING else "good",
                f"MoE layers took {in_percent(moe_s / wall_s)} of the time; "
                f"{in_percent(share)} of theirs was waiting for others.",
            )
        )
    late = communication.get("waited_for")
    if late:
        found.append(
            (
                "plain",
                f"Most waited for: {late['slot']}, {in_seconds(late['wait_s'])} "
                f"({in_percent(late['share'])} of all waiting).",
            )
        )
    return found
