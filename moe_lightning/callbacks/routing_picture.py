"""``routing_balance.png``: a heat map of layers and experts, and how uneven each layer is."""

from pathlib import Path

import numpy as np

from moe_lightning.callbacks.routing_summary import RoutingSummary
from moe_lightning.files import atomic_writer

LIMIT = 3.0
"""Colours end at 1/8 and 8 times the mean."""
DPI = 110


def draw_routing(path: Path, summary: RoutingSummary) -> None:
    """Draw the picture.

    Args:
        path: The PNG file; its directory exists.
        summary: What is drawn.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    layers = summary.layers
    most = max(len(each.load_E) for each in layers)
    relative_LE = np.full((len(layers), most), np.nan)
    dead_LE = np.full((len(layers), most), np.nan)
    for row, each in enumerate(layers):
        load_E = each.load_E.numpy().astype(float)
        with np.errstate(divide="ignore"):
            relative_LE[row, : len(load_E)] = np.log2(load_E / max(load_E.mean(), 1e-9))
        dead_LE[row, : len(load_E)] = np.where(load_E == 0, 1.0, np.nan)
    has_slots = bool(summary.slots and summary.slot_rows)
    height = min(14.0, 2.6 + 0.16 * max(len(layers), 8))
    width = min(15.0, 7.5 + 0.03 * most)
    figure = Figure(figsize=(width + 2.2 * has_slots, height), dpi=DPI, layout="constrained")
    ratios = [6.0, 1.3, 1.3][: 2 + has_slots]
    axes = figure.subplots(1, len(ratios), sharey=True, width_ratios=ratios, squeeze=False)[0]

    image = axes[0].imshow(
        np.clip(relative_LE, -LIMIT, LIMIT),
        cmap="RdBu_r",
        vmin=-LIMIT,
        vmax=LIMIT,
        aspect="auto",
        interpolation="nearest",
    )
    axes[0].imshow(dead_LE, cmap=ListedColormap(["black"]), aspect="auto", interpolation="nearest")
    axes[0].set(xlabel="expert", ylabel="layer")
    step = max(1, -(-len(layers) // 30))
    axes[0].set_yticks(range(0, len(layers), step), [str(e.layer) for e in layers[::step]])
    if most <= 16:
        axes[0].set_xticks(range(most))
    bar = figure.colorbar(image, ax=axes[0], location="bottom", shrink=0.6, aspect=40)
    bar.set_ticks(range(-3, 4), labels=["⅛", "¼", "½", "1", "2", "4", "8"])
    bar.set_label("rows of an expert over the layer's mean (black: none)")

    bars = axes[1].barh(
        range(len(layers)), [each.max_over_mean for each in layers], height=0.8, color="#b2182b"
    )
    axes[1].axvline(1, color="black", linewidth=0.8)
    axes[1].set_xlim(0, 1.3 * max(1.0, summary.worst.max_over_mean))
    axes[1].set(xlabel="busiest / mean\n(1 is even)")
    if len(layers) <= 24:
        axes[1].bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    if has_slots:
        _draw_slots(axes[2], summary)
    figure.suptitle(_title(summary), fontsize=11)
    with atomic_writer(path) as file:
        figure.savefig(file, format="png")


def _draw_slots(axes: "object", summary: RoutingSummary) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    assert summary.slot_rows is not None, "the caller has looked"
    rows_LS = np.array([summary.slot_rows[each.layer].numpy() for each in summary.layers], float)
    share_LS = rows_LS / np.maximum(rows_LS.mean(1, keepdims=True), 1e-9)
    axes.imshow(share_LS, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    if len(summary.layers) <= 24 and len(summary.slots) <= 6:
        for (row, slot), share in np.ndenumerate(share_LS):
            axes.text(slot, row, f"{share:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(summary.slots)), summary.slots, rotation=90, fontsize=8)
    axes.set_xlabel("slot: rows / mean")


def _title(summary: RoutingSummary) -> str:
    verdict = summary.verdict().split(": ", 1)
    return f"{verdict[0][0].upper()}{verdict[0][1:]}\n{verdict[1]}"
