"""What counts of rows say of a run: numbers for a file, and a table for a terminal."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moe_lightning.metrics import load_imbalance, router_entropy

TOP = (1, 8)
WORST_LAYERS = 5
EVEN_ENOUGH = 1.5
"""Up to this, a table calls the mean of the layers' max/mean balanced."""


@dataclass(frozen=True)
class LayerBalance:
    """How evenly one layer's rows were spread over its experts.

    Attributes:
        layer: Decoder layer.
        load_E: Rows of each expert, int64 on the host; a row is one (token, expert) pair.
    """

    layer: int
    load_E: Tensor

    @cached_property
    def num_rows(self) -> int:
        """Rows of all experts."""
        return int(self.load_E.sum())

    @cached_property
    def max_over_mean(self) -> float:
        """The busiest expert's rows over the mean."""
        return float(load_imbalance(self.load_E))

    @cached_property
    def cv(self) -> float:
        """Coefficient of variation."""
        return float(load_imbalance(self.load_E, "cv"))

    @cached_property
    def entropy(self) -> float:
        """Entropy of the shares over log E: 1 is even."""
        return float(router_entropy(self.load_E))

    @cached_property
    def dead_experts(self) -> list[int]:
        """Experts that had no row."""
        return [expert for expert, rows in enumerate(self.load_E.tolist()) if not rows]

    def top_share(self, num: int) -> float:
        """Share of the rows that the busiest experts had."""
        top = self.load_E.topk(min(num, len(self.load_E))).values
        return float(top.sum()) / max(1, self.num_rows)

    def as_dict(self) -> dict[str, Any]:
        """What ``routing_balance.json`` says of the layer."""
        return {
            "num_rows": self.num_rows,
            "num_experts": len(self.load_E),
            "max_over_mean": round(self.max_over_mean, 4),
            "cv": round(self.cv, 4),
            "entropy": round(self.entropy, 4),
            "dead_experts": self.dead_experts,
            "top_share": {str(num): round(self.top_share(num), 4) for num in TOP},
        }


@dataclass(frozen=True)
class RoutingSummary:
    """How evenly a run's rows were spread.

    Attributes:
        layers: Each MoE layer, ascending.
        slots: Names of the slots; none if one had all experts.
        slot_rows: For each layer rows of each slot.
    """

    layers: tuple[LayerBalance, ...]
    slots: tuple[str, ...] = ()
    slot_rows: Mapping[int, Tensor] | None = None

    @classmethod
    def of(
        cls,
        loads: Mapping[int, Tensor],
        slots: tuple[str, ...] = (),
        slot_rows: Mapping[int, Tensor] | None = None,
    ) -> "RoutingSummary":
        """Sum up counts.

        Args:
            loads: For each layer rows of each expert.
            slots: As above.
            slot_rows: As above.
        """
        layers = tuple(LayerBalance(layer, loads[layer]) for layer in sorted(loads))
        rows = dict(slot_rows or {})
        if slots[-1:] == ("master",) and not any(rows_S[-1] for rows_S in rows.values()):
            # A slot only in an emergency.
            slots, rows = slots[:-1], {layer: rows_S[:-1] for layer, rows_S in rows.items()}
        return cls(layers, slots, rows)

    @cached_property
    def worst(self) -> LayerBalance:
        """The layer with the highest max/mean."""
        return max(self.layers, key=lambda each: each.max_over_mean)

    @property
    def mean_max_over_mean(self) -> float:
        """Mean of the layers' max/mean."""
        return sum(each.max_over_mean for each in self.layers) / len(self.layers)

    @property
    def num_dead(self) -> int:
        """Experts without a row, over all layers."""
        return sum(len(each.dead_experts) for each in self.layers)

    def slot_max_over_mean(self) -> dict[int, float]:
        """The busiest slot's rows over the mean, for each layer."""
        return {
            layer: round(float(load_imbalance(rows_S)), 4)
            for layer, rows_S in (self.slot_rows or {}).items()
        }

    def scalars(self, *, per_layer: bool) -> dict[str, float]:
        """What goes to loggers.

        Args:
            per_layer: Whether each layer's max/mean goes too.
        """
        num = len(self.layers)
        values = {
            "routing/max_over_mean": self.mean_max_over_mean,
            "routing/max_over_mean_worst": self.worst.max_over_mean,
            "routing/cv": sum(each.cv for each in self.layers) / num,
            "routing/entropy": sum(each.entropy for each in self.layers) / num,
            "routing/dead_experts": float(self.num_dead),
        }
        if per_layer:
            values |= {
                f"routing/layer_{each.layer}/max_over_mean": each.max_over_mean
                for each in self.layers
            }
        return values

    def to_json(self) -> str:
        """The text of ``routing_balance.json``, one line a layer."""
        slot_rows = {layer: rows_S.tolist() for layer, rows_S in (self.slot_rows or {}).items()}
        sections = {
            "loads": _lines((each.layer, each.load_E.tolist()) for each in self.layers),
            "layers": _lines((each.layer, each.as_dict()) for each in self.layers),
            "slots": json.dumps(self.slots),
            "slot_loads": _lines(slot_rows.items()),
            "slot_max_over_mean": _lines(self.slot_max_over_mean().items()),
        }
        body = ",\n".join(f'  "{name}": {text}' for name, text in sections.items())
        return f"{{\n{body}\n}}\n"

    def verdict(self) -> str:
        """One sentence."""
        evenly = "evenly" if self.mean_max_over_mean <= EVEN_ENOUGH else "unevenly"
        dead = f", {self.num_dead:,} experts had no row" if self.num_dead else ""
        return (
            f"rows are spread {evenly} over experts: the busiest of a layer has "
            f"{self.mean_max_over_mean:.2f}x the mean, {self.worst.max_over_mean:.2f}x at worst "
            f"(layer {self.worst.layer}){dead}"
        )

    def table(self) -> str:
        """A few lines for a terminal: the verdict, the layers that are worst, and the slots."""
        by_imbalance = sorted(self.layers, key=lambda each: -each.max_over_mean)
        lines = [f"routing: {self.verdict()}"]
        lines.append(f"{'layer':>7}{'rows':>12}{'max/mean':>10}{'cv':>7}{'entropy':>9}{'dead':>6}")
        for each in by_imbalance[:WORST_LAYERS]:
            lines.append(
                f"{each.layer:>7}{each.num_rows:>12,}{each.max_over_mean:>10.2f}{each.cv:>7.2f}"
                f"{each.entropy:>9.3f}{len(each.dead_experts):>6}"
            )
        left = len(by_imbalance) - WORST_LAYERS
        if left > 0:
            lines.append(f"    ... and {left} layers that are more even")
        if self.slots and self.slot_rows:
            total_S = torch.stack(list(self.slot_rows.values())).sum(0)
            per_layer = self.slot_max_over_mean()
            worst = max(per_layer, key=lambda layer: per_layer[layer])
            shares = (100 * total_S / max(1, int(total_S.sum()))).tolist()
            named = [f"{n} {share:.0f} %" for n, share in zip(self.slots, shares, strict=True)]
            lines.append(
                f"slots: {', '.join(named[:8])}{', ...' if len(named) > 8 else ''}; max/mean "
                f"{per_layer[worst]:.2f} at worst (layer {worst})"
            )
        return "\n".join(lines)


def _lines(items: Iterable[tuple[int, Any]]) -> str:
    lines = ",\n".join(f'    "{layer}": {json.dumps(value)}' for layer, value in items)
    return f"{{\n{lines}\n  }}" if lines else "{}"
