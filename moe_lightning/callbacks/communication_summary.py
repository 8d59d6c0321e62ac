"""What the times of all ranks say: numbers for a file, and a few lines for a terminal.

One process: its slots are devices or workers, and a wait is for the slot that it names. Ranks: each
is a slot, times are means over those that had passes, and whoever waits least is the one that the
others wait for, as much longer as they do.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moe_lightning.callbacks.communication_times import (
    PARTS,
    CommunicationTimes,
    LayerTimes,
    matrix_of,
)

NUMBERS = tuple(field.name for field in fields(LayerTimes))


@dataclass(frozen=True)
class LayerSummary:
    """One layer, the mean over the ranks that had passes; see ``LayerTimes``."""

    times: LayerTimes
    compute_s_by_slot: list[float]
    wait_s_by_slot: list[float]

    @property
    def exposed_s(self) -> float:
        """What moving rows cost."""
        return self.times.dispatch_s + self.times.combine_s + self.times.wait_s

    @property
    def overlapped_s(self) -> float:
        """Work of other slots, or of another part of the batch, that nobody waited for."""
        others_s = max(0.0, self.times.others_s - self.times.wait_s)
        return max(others_s, self.times.handed_over_s)

    def as_dict(self) -> dict[str, Any]:
        """What ``communication_time.json`` says of the layer."""
        times = {
            name: getattr(self.times, name) for name in ("total_s", *(f"{p}_s" for p in PARTS))
        }
        times |= {"exposed_s": self.exposed_s, "overlapped_s": self.overlapped_s}
        by_slot = {
            "compute_s_by_slot": [round(s, 6) for s in self.compute_s_by_slot],
            "wait_s_by_slot": [round(s, 6) for s in self.wait_s_by_slot],
        }
        rounded = {name: round(seconds, 6) for name, seconds in times.items()}
        return {"num_passes": self.times.num_passes, **rounded, **by_slot}


@dataclass(frozen=True)
class CommunicationSummary:
    """Where the time of a run's MoE layers went.

    Attributes:
        layers: Each MoE layer that had passes.
        slots: Names of the slots.
        links: Bytes from slot to slot.
        under_way_s: Seconds that each slot's rows and sums were on their way.
        wall_s: Seconds of the run.
        link_bytes_per_s: What a link could do; None if that is not known.
        sharding: What FSDP gathered and reduced, mean over ranks; None without.
    """

    layers: Mapping[int, LayerSummary]
    slots: tuple[str, ...]
    links: list[list[int]]
    under_way_s: list[float]
    wall_s: float
    link_bytes_per_s: float | None = None
    sharding: Mapping[str, float] | None = None

    @classmethod
    def of_process(
        cls, times: CommunicationTimes, *, wall_s: float, link_bytes_per_s: float | None
    ) -> "CommunicationSummary":
        """Sum up a run of one process."""
        slots = tuple(times.slots)
        layers = {
            layer: LayerSummary(
                times.layers[layer],
                [times.compute_s.get((layer, slot), 0.0) for slot in slots],
                [times.wait_s.get((layer, slot), 0.0) for slot in slots],
            )
            for layer in sorted(times.layers)
        }
        under_way_s = [times.under_way_s.get(slot, 0.0) for slot in slots]
        links = matrix_of(times.links, slots)
        return cls(layers, slots, links, under_way_s, wall_s, link_bytes_per_s)

    @classmethod
    def of_ranks(
        cls,
        numbers_WLN: Tensor,
        links_WWW: Tensor,
        under_way_W: Tensor,
        layers: Sequence[int],
        *,
        wall_s: float,
        link_bytes_per_s: float | None,
        sharding: Mapping[str, float] | None,
    ) -> "CommunicationSummary":
        """Sum up a run of several ranks.

        Args:
            numbers_WLN: For each rank and layer what ``NUMBERS`` names.
            links_WWW: Bytes as each rank counted them; none is counted twice.
            under_way_W: Seconds of each rank.
            layers: The layers.
            wall_s: Seconds of the run.
            link_bytes_per_s: What a link could do.
            sharding: What FSDP took.
        """
        numbers_LWN = numbers_WLN.transpose(0, 1)
        summaries = {}
        for layer, numbers_WN in zip(layers, numbers_LWN, strict=True):
            has_passes_W = numbers_WN[:, 0] > 0
            if not has_passes_W.any():
                continue
            mean_N = numbers_WN[has_passes_W].mean(0).tolist()
            times = LayerTimes(**dict(zip(NUMBERS, mean_N, strict=True)))
            times.num_passes = round(times.num_passes)
            wait_W = numbers_WN[:, NUMBERS.index("wait_s")]
            least_W = torch.where(has_passes_W, wait_W, torch.inf)
            waits = [0.0] * len(wait_W)
            # What all wait is the exchange itself, and nobody's fault.
            waits[int(least_W.argmin())] = max(0.0, times.wait_s - float(least_W.min()))
            compute_W = numbers_WN[:, NUMBERS.index("compute_s")]
            summaries[layer] = LayerSummary(times, compute_W.tolist(), waits)
        slots = tuple(f"rank {rank}" for rank in range(len(under_way_W)))
        links = links_WWW.sum(0).to(torch.int64).tolist()
        return cls(
            summaries, slots, links, under_way_W.tolist(), wall_s, link_bytes_per_s, sharding
        )

    @cached_property
    def total(self) -> LayerTimes:
        """All layers."""
        total = LayerTimes()
        for each in self.layers.values():
            for name in NUMBERS:
                setattr(total, name, getattr(total, name) + getattr(each.times, name))
        return total

    def rates(self) -> list[list[float]]:
        """Bytes per second of each link while something was on its way there."""

        def rate(source: int, target: int) -> float:
            seconds = [s for s in (self.under_way_s[source], self.under_way_s[target]) if s]
            # Of a process and a slot, the slot's; of two ranks, the mean of both.
            mean_s = sum(seconds) / len(seconds) if seconds else 0.0
            return round(self.links[source][target] / mean_s, 1) if mean_s else 0.0

        numbers = range(len(self.slots))
        return [[rate(source, target) for target in numbers] for source in numbers]

    def waited_for(self) -> dict[str, Any] | None:
        """The slot that was waited for longest; None if nobody waited."""
        by_slot = [
            sum(each.wait_s_by_slot[slot] for each in self.layers.values())
            for slot in range(len(self.slots))
        ]
        whole = self.total.wait_s
        if not whole or not any(by_slot):
            return None
        slot = max(range(len(by_slot)), key=by_slot.__getitem__)
        return {
            "slot": self.slots[slot],
            "wait_s": round(by_slot[slot], 6),
            "share": round(by_slot[slot] / whole, 4),
        }

    def to_json(self) -> str:
        """The text of ``communication_time.json``, one line a layer."""
        rates, peak = self.rates(), self.link_bytes_per_s
        fractions = None
        if peak and any(map(any, self.links)):
            fractions = [[round(rate / peak, 4) for rate in row] for row in rates]
        sections: dict[str, Any] = {
            "slots": self.slots,
            "num_passes": self.total.num_passes,
            "wall_s": round(self.wall_s, 6),
            "moe_s": round(self.total.total_s, 6),
            "waited_for": self.waited_for(),
            "bytes": self.links,
            "link_bytes_per_s": rates,
            "link_peak_bytes_per_s": peak,
            "link_fraction": fractions,
            "sharding": self.sharding,
        }
        lines = [f'  "{name}": {json.dumps(value)}' for name, value in sections.items()]
        layers = ",\n".join(
            f'    "{layer}": {json.dumps(each.as_dict())}' for layer, each in self.layers.items()
        )
        lines.append(f'  "layers": {{\n{layers}\n  }}')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def scalars(self) -> dict[str, float]:
        """What goes to loggers, in seconds."""
        total = self.total
        values = {f"communication/{part}_s": getattr(total, f"{part}_s") for part in PARTS}
        return values | {"communication/moe_s": total.total_s}

    def verdict(self) -> str:
        """One sentence or two."""
        total = self.total
        if not total.total_s:
            return "no MoE layer was computed"
        parts = ", ".join(
            f"{part} {100 * getattr(total, f'{part}_s') / total.total_s:.0f} %" for part in PARTS
        )
        share = 100 * total.total_s / self.wall_s if self.wall_s else 0.0
        text = f"MoE layers took {share:.0f} % of {self.wall_s:.1f} s: {parts}"
        late = self.waited_for()
        if late is not None and late["wait_s"] > 0.02 * total.total_s:
            text += f"; most waited for: {late['slot']} ({100 * late['share']:.0f} %)"
        return text

    def table(self) -> str:
        """A few lines for a terminal."""
        lines = [f"communication: {self.verdict()}"]
        moved = sum(map(sum, self.links))
        if moved:
            lines.append(f"  {moved / 1e6:,.1f} MB moved between {len(self.slots)} slots")
        if self.sharding:
            gathered, reduced = self.sharding["gather_bytes"], self.sharding["reduce_bytes"]
            lines.append(
                f"  FSDP on each rank: {gathered / 1e6:,.1f} MB of weights gathered in "
                f"{self.sharding['gather_s']:.2f} s, {reduced / 1e6:,.1f} MB of gradients reduced "
                f"in {self.sharding['reduce_s']:.2f} s"
            )
        return "\n".join(lines)
