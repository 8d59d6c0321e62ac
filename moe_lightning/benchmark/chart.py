"""``benchmark.png``: tokens per second, and where the time of a layer goes."""

from collections.abc import Sequence
from pathlib import Path

from moe_lightning.benchmark.rounds import PARTS, Result
from moe_lightning.callbacks.communication_picture import COLOURS
from moe_lightning.files import atomic_writer

DPI = 110
GATHER = {"gather": "#b08bc4"}


def draw(path: Path, results: Sequence[Result]) -> None:
    """Draw the chart; nothing if there are no results.

    Args:
        path: The PNG file; its directory exists.
        results: What is drawn, in this order from above.
    """
    if not results:
        return
    from matplotlib.figure import Figure

    height = 1.6 + 0.42 * len(results)
    figure = Figure(figsize=(14, height), dpi=DPI, layout="constrained")
    speed = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1], sharey=True)
    colours = COLOURS | GATHER
    names = [result.contestant.name for result in results]
    places = range(len(results))
    for axes, phase in zip(speed[:2], ("prefill", "decode"), strict=True):
        key = f"{phase}_tokens_per_s"
        values = [result.median(key) or 0.0 for result in results]
        spans = [result.values(key) or [0.0] for result in results]
        below = [v - min(s) for v, s in zip(values, spans, strict=True)]
        above = [max(s) - v for v, s in zip(values, spans, strict=True)]
        axes.barh(places, values, color="#5b7fa6", height=0.7)
        if any(len(span) > 1 for span in spans):
            axes.errorbar(values, places, xerr=[below, above], fmt="none", color="#222222", lw=1)
        axes.set_title(f"{phase}, tokens/s", fontsize=10)
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    for axes, phase in zip(speed[2:], ("prefill", "decode"), strict=True):
        left = [0.0] * len(results)
        for part in PARTS:
            widths = [(result.median(f"{phase}_{part}_us") or 0.0) / 1e3 for result in results]
            axes.barh(places, widths, left=left, color=colours[part], label=part, height=0.7)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_title(f"{phase}, ms of a MoE layer", fontsize=10)
        axes.margins(x=0.03)
    speed[0].set_yticks(places, names)
    speed[0].invert_yaxis()
    handles, labels = speed[3].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(PARTS), frameon=False)
    with atomic_writer(path) as file:
        figure.savefig(file, format="png")
