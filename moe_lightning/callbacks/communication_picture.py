"""``communication_time.png``: where the time of each layer went, and who was waited for."""

from pathlib import Path

from moe_lightning.callbacks.communication_summary import CommunicationSummary
from moe_lightning.files import atomic_writer

COLOURS = {
    "dispatch": "#4393c3",
    "compute": "#74a57f",
    "combine": "#92c5de",
    "wait": "#d6604d",
}
DPI = 110


def draw_communication(path: Path, summary: CommunicationSummary) -> None:
    """Draw the picture.

    Args:
        path: The PNG file; its directory exists.
        summary: What is drawn.
    """
    from matplotlib.figure import Figure

    layers = list(summary.layers)
    num_slots = len(summary.slots)
    height = min(14.0, 2.4 + 0.2 * max(len(layers), 8))
    figure = Figure(figsize=(12.5 if num_slots > 1 else 9, height), dpi=DPI, layout="constrained")
    ratios = [3.0, 1.4] if num_slots > 1 else [1.0]
    axes = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]

    longest_us = max(
        1e6 * each.times.total_s / max(1, each.times.num_passes) for each in summary.layers.values()
    )
    unit, scale = ("ms", 1e3) if longest_us > 10_000 else ("µs", 1e6)
    left = [0.0] * len(layers)
    for part, colour in COLOURS.items():
        widths = [
            scale * getattr(each.times, f"{part}_s") / max(1, each.times.num_passes)
            for each in summary.layers.values()
        ]
        axes[0].barh(range(len(layers)), widths, left=left, color=colour, label=part, height=0.8)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    step = max(1, -(-len(layers) // 30))
    axes[0].set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes[0].margins(y=0.01)
    axes[0].invert_yaxis()
    axes[0].set(xlabel=f"{unit} of a pass, mean", ylabel="layer")
    figure.legend(loc="outside lower left", ncols=len(COLOURS), frameon=False)
    if num_slots > 1:
        _draw_slots(axes[1], summary)
    verdict = summary.verdict()
    figure.suptitle("\n".join(verdict.split(": ", 1)), fontsize=11)
    with atomic_writer(path) as file:
        figure.savefig(file, format="png")


def _draw_slots(axes: object, summary: CommunicationSummary) -> None:
    """Per slot, how long it computed and how long it was waited for."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    numbers = range(len(summary.slots))

    def total(name: str) -> list[float]:
        each = (getattr(layer, name) for layer in summary.layers.values())
        return [sum(column) for column in zip(*each, strict=True)]

    axes.barh(
        [n - 0.2 for n in numbers],
        total("compute_s_by_slot"),
        height=0.4,
        color=COLOURS["compute"],
    )
    axes.barh(
        [n + 0.2 for n in numbers], total("wait_s_by_slot"), height=0.4, color=COLOURS["wait"]
    )
    axes.set_yticks(numbers, summary.slots, fontsize=8)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.yaxis.tick_right()
    axes.locator_params(axis="x", nbins=4)
    axes.set(xlabel="seconds it computed, and was waited for")
